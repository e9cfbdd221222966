"""Choosing a method's settings for a click log: by short trainings, on training rows alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from embcompress.bench.settings import TrainingSettings
from embcompress.bench.training import build_model, count_ids
from embcompress.data.click_log import ClickLog
from embcompress.methods import Method, resolve_method
from embcompress.planner.trials import (
    MOST_EXAMPLES,
    TRIAL_SEED,
    Trial,
    TrialData,
    choose,
    distinct,
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

    def build(candidate: Method) -> nn.Module:
        return build_model(log, settings, candidate, budget, TRIAL_SEED, counts)

    methods = resolve_method(method).candidates()
    if len(methods) > 1:
        if settings.split != "random":
            counts = count_ids(log, rows[: len(rows) // 2])
        methods = distinct(methods, lambda candidate: _plans(build(candidate)))
    if len(methods) == 1:
        return [Trial(methods[0])]
    if settings.split == "random":
        rows = np.random.default_rng(TRIAL_SEED).permutation(rows)
    rows = rows[-MOST_EXAMPLES:]
    data = TrialData.of(
        ((batch.dense, batch.ids, batch.offsets), batch.label)
        for start in range(0, len(rows), settings.batch_size)
        for batch in [log.batch(rows[start : start + settings.batch_size])]
    )
    return choose(methods, build, data, seconds)


def _plans(model: nn.Module) -> str:
    tables = model.get_submodule("embeddings.embedding_bags")
    return repr([str(table.plan) for table in tables.children()])
