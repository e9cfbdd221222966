"""Which learning rates a run tries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: So many seeds of a cell try every learning rate: one alone is at the mercy of its noise.
TRYING_SEEDS = 2

#: Of the finished runs of a cell by seed: learning rate and validation AUC of every training.
Trials = Mapping[int, Sequence[Mapping[str, float]]]


def learning_rates(
    grid: tuple[float, ...], seeds: Sequence[int], seed: int, trials: Trials
) -> tuple[float, ...]:
    """All of the grid for the first seeds of a cell; what was best for these, for the others.

    Args:
        grid: of every method alike.
        seeds: of the sweep, in order.
        seed: of the run.
        trials: of the cell's runs so far. Where one of the first seeds is missing, all rates are
            tried.
    """
    first = seeds[:TRYING_SEEDS]
    if seed in first or not all(each in trials for each in first):
        return grid
    tried = [trial for each in first for trial in trials[each]]
    scores = {
        rate: sum(trial["auc"] for trial in tried if trial["learning_rate"] == rate)
        for rate in grid
    }
    return (max(scores, key=scores.__getitem__),)
