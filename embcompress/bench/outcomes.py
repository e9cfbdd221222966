"""The records of runs: finished, impossible and failed ones."""

from __future__ import annotations

import datetime
import traceback
from dataclasses import asdict, dataclass
from typing import Any

from embcompress.bench.environment import environment
from embcompress.bench.lookup import LookupTime
from embcompress.bench.records import FAILED, IMPOSSIBLE, Record
from embcompress.bench.settings import Run, jsonable
from embcompress.bench.training import Score, Trained, finite, validation_record
from embcompress.budget import BudgetError, parse_budget
from embcompress.data.click_log import ClickLog
from embcompress.memory import MemoryReport
from embcompress.planner.trials import Trial

_TRACEBACK_CHARACTERS = 4000


def _identity(run: Run) -> Record:
    return {
        "key": run.key,
        "method": run.method,
        "budget": run.budget,
        "seed": run.seed,
        "data": run.data,
        "model": run.training.model,
    }


def _date() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def impossible_record(run: Run, error: BudgetError) -> Record:
    """Of a run whose method cannot meet the budget."""
    return {
        **_identity(run),
        "status": IMPOSSIBLE,
        "smallest_bytes": error.smallest,
        "message": str(error),
    }


def failed_record(run: Run, error: str, details: str = "") -> Record:
    """Of a run that ended in an error; ``details`` are shown by nobody, but kept."""
    return {
        **_identity(run),
        "status": FAILED,
        "error": error,
        "traceback": details[-_TRACEBACK_CHARACTERS:],
        "date": _date(),
    }


def error_record(run: Run, error: Exception) -> Record:
    """Of a run that raised this."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return failed_record(run, f"{type(error).__name__}: {error}", "".join(lines))


@dataclass(frozen=True)
class Finished:
    """What there is to say of a finished run.

    Attributes:
        best: the training whose learning rate was chosen.
        scores: of test rows, by epoch.
        trials: a learning rate, validation AUC and seconds for every training.
        size: of the deployed tables.
        lookup: what each table was made into.
        time: of the deployed tables' lookups.
        tried: settings of the method that were tried in short trainings, and how long that took.
    """

    best: Trained
    scores: dict[int, Score]
    trials: list[dict[str, float]]
    size: MemoryReport
    lookup: list[dict[str, object]]
    time: LookupTime
    tried: tuple[list[Trial], float]


def result_record(run: Run, log: ClickLog, finished: Finished) -> Record:
    """Of a finished run; ``docs/benchmark.md`` says what the fields are."""
    best, dense = finished.best, finished.size.dense
    tried, plan_seconds = finished.tried
    return {
        **_identity(run),
        "bytes": finished.size.total,
        "budget_bytes": parse_budget(run.budget, dense),
        "dense_bytes": dense,
        "training_bytes": best.training_bytes,
        "offloaded_bytes": finished.size.offloaded,
        "plan_bytes": finished.size.plan_bytes,
        **_score(finished.scores[best.best_epoch]),
        "single_epoch": _score(finished.scores[1]),
        "auc_over_time": [None if each is None else each.auc for each in best.over_time],
        "train_seconds": best.train_seconds,
        "examples_per_second": best.examples / best.train_seconds,
        "lookup_microseconds": finished.time.microseconds,
        "full_lookup_microseconds": finished.time.full,
        "learning_rate": best.learning_rate,
        "best_epoch": best.best_epoch,
        "epochs": len(best.validation),
        "phases": [asdict(phase) for phase in best.phases],
        "validation": validation_record(best),
        "learning_rate_trials": finished.trials,
        "plan_seconds": plan_seconds,
        "tried": [
            {
                "settings": str(each.method),
                "passes": each.passes,
                "auc": each.auc,
                "lead": each.lead,
            }
            for each in tried
        ],
        "lookup": finished.lookup,
        "rows": len(log),
        "teacher_auc": log.meta.get("teacher_auc"),
        "settings": jsonable(asdict(run.training)),
        **environment(),
        "date": _date(),
    }


def _score(score: Score) -> dict[str, Any]:
    return {"auc": score.auc, "logloss": finite(score.logloss)}
