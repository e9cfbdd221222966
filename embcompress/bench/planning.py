"""Choosing a method's settings for a click log: by short trainings, on training rows alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from embcompress.bench.settings import TrainingSettings
from embcompress.bench.training import build_model, count_ids
from embcompress.budget import parse_budget
from embcompress.data.click_log import ClickLog
from embcompress.methods import Method, resolve_method
from embcompress.planner.search import PlanSearch
from embcompress.planner.trials import (
    MOST_EXAMPLES,
    TRIAL_SEED,
    Trial,
    TrialData,
)


def try_candidates(
    log: ClickLog,
    rows: NDArray[np.int64],
    settings: TrainingSettings,
    method: str,
    budget: str,
    counts: dict[str, Tensor],
    seconds: float,
) -> list[Trial]:
    """What a method could be set to, the chosen one first; see :func:`choose`.

    Args:
        rows: training rows; the candidates are trained on some and compared by others of them, in
            time order by the latest.
        counts: of the ids of each feature in these rows. For rows in time order those of their
            first half are used instead, so that a plan shows what it loses when other ids come to
            be frequent.
        seconds: trainings end after so long.

    Raises:
        BudgetError: the method cannot meet the budget for these tables.
    """
    asked = resolve_method(method)
    if len(asked.candidates()) == 1:
        return [Trial(asked)]
    if settings.split != "random":
        counts = count_ids(log, rows[: len(rows) // 2])

    def build(candidate: Method, size: int) -> nn.Module:
        return build_model(log, settings, candidate, size, TRIAL_SEED, counts)

    dense = sum(4 * settings.embedding_dim * f.num_embeddings for f in log.features)
    search = PlanSearch(
        build,
        plans=lambda candidate, size: _plans(build(candidate, size)),
        expected=lambda candidate, size: math.nan,  # no budget is looked for
        dense_bytes=dense,
        data=trial_data(log, rows, settings),
        seconds=seconds,
    )
    return search.settings(asked, parse_budget(budget, dense))


def trial_data(log: ClickLog, rows: NDArray[np.int64], settings: TrainingSettings) -> TrialData:
    """Training rows to try plans on: shuffled where the split is random, else the latest."""
    if settings.split == "random":
        rows = np.random.default_rng(TRIAL_SEED).permutation(rows)
    rows = rows[-MOST_EXAMPLES:]
    return TrialData.of(
        ((batch.dense, batch.ids, batch.offsets), batch.label)
        for start in range(0, len(rows), settings.batch_size)
        for batch in [log.batch(rows[start : start + settings.batch_size])]
    )


def _plans(model: nn.Module) -> str:
    tables = model.get_submodule("embeddings.embedding_bags")
    return repr([str(table.plan) for table in tables.children()])
