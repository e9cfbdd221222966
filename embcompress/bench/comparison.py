"""Methods compared with each other: ranks over budgets, and differences from plain hashing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from embcompress.bench.summary import Cell, Summary

#: What every method must beat to be worth its while: it is exact at every budget, and free.
BASELINE = "hash"


@dataclass(frozen=True)
class Ranking:
    """One method over the budgets of a summary.

    Attributes:
        method: its name.
        rank: mean over the budgets of its place by mean test AUC, from 1. Where several cannot be
            placed (a budget that they cannot meet, runs that failed, more bytes in files), they
            share the mean of the last places.
        loss: mean over the budgets that it met of the full tables' AUC less its own; None where
            it met none, or there are no full tables.
        met: number of budgets with a result.
        budgets: number of budgets that it was asked for.
    """

    method: str
    rank: float
    loss: float | None
    met: int
    budgets: int


def rankings(summary: Summary) -> list[Ranking]:
    """Every method but ``full``, the best first; of equals, those that met more budgets."""
    places: dict[str, list[float]] = {m: [] for m in summary.methods if m != "full"}
    for budget in summary.budgets:
        cells = [summary.find(method, budget) for method in places]
        for method, place in _places(cell for cell in cells if cell is not None).items():
            places[method].append(place)
    found = [_ranking(summary, method, each) for method, each in places.items()]
    return sorted(found, key=lambda r: (r.rank, -r.met, r.loss or 0.0))


def _places(cells: Iterable[Cell]) -> dict[str, float]:
    """Places by mean AUC at one budget; equals share the mean of theirs."""
    quality = {
        c.method: -math.inf if c.auc is None or c.offloaded_bytes else c.auc.mean for c in cells
    }
    order = sorted(quality.values(), reverse=True)
    # Of n equal values from place p on, the mean place is p + (n - 1) / 2.
    return {
        method: 1 + order.index(value) + (order.count(value) - 1) / 2
        for method, value in quality.items()
    }


def _ranking(summary: Summary, method: str, places: list[float]) -> Ranking:
    full = None if summary.full is None else summary.full.auc
    cells = [summary.find(method, budget) for budget in summary.budgets]
    reached = [cell.auc.mean for cell in cells if cell is not None and cell.auc is not None]
    loss = None
    if full is not None and reached:
        loss = full.mean - statistics.fmean(reached)
    return Ranking(method, statistics.fmean(places), loss, len(reached), len(places))


@dataclass(frozen=True)
class Difference:
    """Test AUC of one method less that of another at the same budget, paired over seeds.

    Attributes:
        mean: over the seeds that both have finished.
        seeds: their number.
        error: standard error of the mean, from the spread of the paired differences; None below
            two seeds.
        p_value: two-sided, of Student's t-test of the paired differences; None below two seeds,
            and where all differences are equal. With three seeds the test has two degrees of
            freedom: it misses most real differences of one deviation, and is not corrected for
            the number of comparisons.
    """

    mean: float
    seeds: int
    error: float | None
    p_value: float | None


def difference(
    summary: Summary, method: str, budget: str, baseline: str = BASELINE
) -> Difference | None:
    """The difference from another method; None where there is nothing to compare."""
    one, other = summary.find(method, budget), summary.find(baseline, budget)
    if one is None or other is None or method == baseline:
        return None
    seeds = [seed for seed in one.auc_by_seed if seed in other.auc_by_seed]
    if not seeds:
        return None
    pairs = [(one.auc_by_seed[seed], other.auc_by_seed[seed]) for seed in seeds]
    differences = [a - b for a, b in pairs]
    error = p_value = None
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    if len(set(differences)) > 1:
        from scipy.stats import ttest_rel

        p_value = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return Difference(statistics.fmean(differences), len(seeds), error, p_value)
