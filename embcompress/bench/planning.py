"""Choosing a method's settings for a click log: by short trainings, and never by test rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from embcompress.bench.settings import TrainingSettings
from embcompress.bench.training import build_model, count_ids, table_configs
from embcompress.budget import parse_budget
from embcompress.collection import plan_tables
from embcompress.data.click_log import ClickLog, Split
from embcompress.methods import Method, resolve_method
from embcompress.plan import LookupPlan
from embcompress.planner.search import PlanSearch
from embcompress.planner.trial_data import MOST_EXAMPLES, Example, TrialData
from embcompress.planner.trials import TRIAL_SEED, Trial

#: Validation rows that plans are compared by, at most.
_MOST_COMPARED = MOST_EXAMPLES // 8


def try_candidates(
    log: ClickLog,
    split: Split,
    settings: TrainingSettings,
    method: str,
    budget: str,
    counts: dict[str, Tensor],
    seconds: float,
) -> list[Trial]:
    """What a method could be set to, the chosen one first; see :func:`choose`.

    Args:
        split: candidates are trained on training rows, in time order the latest, and compared by
            validation rows. Of a prequential run the validation rows are predictions already, and
            candidates are compared by the latest training rows.
        counts: of the ids of each feature in the training rows. For a prequential run those of
            their first half are used instead, so that a plan shows what it loses when other ids
            come to be frequent.
        seconds: trainings end after so long.

    Raises:
        BudgetError: the method cannot meet the budget for these tables.
    """
    asked = resolve_method(method)
    if len(asked.candidates()) == 1:
        return [Trial(asked)]
    trials = PlanTrials(log, split, settings, counts)
    dense = sum(4 * settings.embedding_dim * f.num_embeddings for f in log.features)
    search = PlanSearch(
        trials.build,
        plans=trials.plans,
        expected=lambda candidate, size: math.nan,  # no budget is looked for
        dense_bytes=dense,
        data=trials.data,
        seconds=seconds,
    )
    return search.settings(asked, parse_budget(budget, dense))


class PlanTrials:
    """Models for trials, and what they are trained on.

    Args:
        log, split, settings, counts: see :func:`try_candidates`.

    Attributes:
        data: see :func:`trial_data`.
    """

    def __init__(
        self, log: ClickLog, split: Split, settings: TrainingSettings, counts: dict[str, Tensor]
    ) -> None:
        self._log, self._settings = log, settings
        self._rows = _trial_order(split, settings)
        self.data = trial_data(log, split, settings)
        if settings.split == "prequential":
            counts = count_ids(log, self._rows[: len(self._rows) // 2])
        self._counts = counts
        self._part = self.data, counts
        self._plans: dict[tuple[Method, int], tuple[LookupPlan, ...]] = {}

    def plans(self, method: Method, size: int) -> tuple[LookupPlan, ...]:
        """The method's plans of all tables in so many bytes."""
        if (method, size) not in self._plans:
            tables = table_configs(self._log, self._settings, self._counts)
            plans = plan_tables(tables, method=method, budget=size, seed=TRIAL_SEED)
            self._plans[method, size] = tuple(plans)
        return self._plans[method, size]

    def build(self, method: Method, size: int, data: TrialData) -> nn.Module:
        """The model; which ids have rows of their own follows from what it is to be trained on."""
        counts, plans = self._counts_of(data), self.plans(method, size)
        details = (self._log, self._settings, method, None, TRIAL_SEED, counts)
        return build_model(*details, plans=plans)

    def _counts_of(self, data: TrialData) -> dict[str, Tensor]:
        """Of the training rows that some trial data end with, and all before."""
        if data is self.data or self._settings.split == "prequential":
            return self._counts
        if data is not self._part[0]:
            known = len(self._rows) - self.data.examples + data.examples
            self._part = data, count_ids(self._log, self._rows[:known])
        return self._part[1]


def _trial_order(split: Split, settings: TrainingSettings) -> NDArray[np.int64]:
    """Training rows in time order, or shuffled where the split is random."""
    if settings.split != "random":
        return split.train
    return np.random.default_rng(TRIAL_SEED).permutation(split.train)


def trial_data(log: ClickLog, split: Split, settings: TrainingSettings) -> TrialData:
    """Rows to try plans on: of training rows so many, the latest where they are in time order."""
    rows = _trial_order(split, settings)
    training = _batches(log, rows[-MOST_EXAMPLES:], settings)
    if settings.split == "prequential":
        return replace(TrialData.of(training), is_prequential=True)
    every = -(-len(split.validation) // _MOST_COMPARED)
    return TrialData(list(training), list(_batches(log, split.validation[::every], settings)))


def _batches(
    log: ClickLog, rows: NDArray[np.int64], settings: TrainingSettings
) -> Iterator[Example]:
    for start in range(0, len(rows), settings.batch_size):
        batch = log.batch(rows[start : start + settings.batch_size])
        yield (batch.dense, batch.ids, batch.offsets), batch.label.float()
