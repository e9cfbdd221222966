"""The memory-budget sweep: which method loses least at which budget."""

from __future__ import annotations

import datetime
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from embcompress.bench.display import SweepDisplay
from embcompress.bench.environment import environment, torch_threads
from embcompress.bench.planning import try_candidates
from embcompress.bench.prequential import train_prequential
from embcompress.bench.records import Record, RecordFile, only_writer
from embcompress.bench.settings import Run, SweepSettings, jsonable
from embcompress.bench.training import (
    Trained,
    build_model,
    count_ids,
    deployed,
    finite,
    test_scores,
    train,
    validation_record,
)
from embcompress.budget import BudgetError, parse_budget
from embcompress.data.click_log import ClickLog, Split
from embcompress.data.load import load_click_log
from embcompress.memory import MemoryReport, memory
from embcompress.models import ClickModel
from embcompress.modules import EmbeddingBag
from embcompress.planner.trials import Trial

RESULTS, IMPOSSIBLE = "results.jsonl", "impossible.jsonl"
#: So many seeds of a cell try every learning rate: one alone is at the mercy of its noise.
_TRYING_SEEDS = 2


class Sweep:
    """Runs what is missing of a sweep and keeps its records in a directory.

    ``results.jsonl`` has a line for every finished run, ``impossible.jsonl`` one for every run
    whose method cannot meet the budget, with the smallest that it can.
    """

    def __init__(self, settings: SweepSettings, directory: Path, cache: Path | None) -> None:
        self.settings, self.directory, self.cache = settings, directory, cache
        self.results = RecordFile(directory / RESULTS)
        self.impossible = RecordFile(directory / IMPOSSIBLE)
        self._counts: dict[str, Tensor] = {}
        self._tried: dict[str, tuple[list[Trial], float]] = {}  # by run, and how long it took
        self._counted: tuple[object, ...] = ()  # what the counts are of

    def _is_done(self, run: Run) -> bool:
        return run.key in self.results or run.key in self.impossible

    def run(self, display: SweepDisplay) -> None:
        """Do every missing run."""
        runs = list(self.settings.runs())
        display.start(len(runs), sum(map(self._is_done, runs)))
        for data in self.settings.data:
            missing = [run for run in runs if run.data == data and not self._is_done(run)]
            if missing:
                log = load_click_log(data, cache=self.cache)
                for run in missing:
                    self._run_one(run, log, display)

    def _run_one(self, run: Run, log: ClickLog, display: SweepDisplay) -> None:
        display.begin(run)
        try:
            learning_rates = self._learning_rates(run)
            model = self._build(run, log)
        except BudgetError as error:
            self.impossible.append(_impossible_record(run, error))
            display.end(run, None)
            return
        _checked_memory(run, model)
        lookup = _lookup_settings(model)
        split = _split(run, log)
        best: Trained | None = None  # the others' weights are let go
        trials: list[dict[str, float]] = []
        for learning_rate in learning_rates:
            if trials:
                model = self._build(run, log)
            observe = display.observer(learning_rate)
            settings = run.training
            if settings.split == "prequential":
                trained = train_prequential(model, log, split, settings, learning_rate, observe)
            else:
                trained = train(model, log, split, settings, learning_rate, run.seed, observe)
            trials.append({"learning_rate": learning_rate, "auc": trained.best_auc})
            if best is None or trained.best_auc > best.best_auc:
                best = trained
        assert best is not None  # there is at least one learning rate
        scores = test_scores(best, log, split.test)
        size = _checked_memory(run, deployed(best, best.best_epoch))
        record = _result_record(run, log, best, trials, size, lookup)
        tried, record["plan_seconds"] = self._tried.pop(run.key)
        record["tried"] = [
            {"settings": str(each.method), "passes": each.passes, "auc": each.auc} for each in tried
        ]
        record["auc"], record["logloss"] = (
            scores[best.best_epoch].auc,
            finite(scores[best.best_epoch].logloss),
        )
        record["single_epoch"] = {"auc": scores[1].auc, "logloss": finite(scores[1].logloss)}
        self.results.append(record)
        display.end(run, record)

    def _build(self, run: Run, log: ClickLog) -> ClickModel:
        """A new model; the tables know how often each id occurs in the training rows."""
        rows = _split(run, log).train
        if self._counted != (key := (run.data, run.seed, run.training)):
            self._counts = count_ids(log, rows)
            self._counted = key
        details = (run.training, run.method, run.budget, run.seed, self._counts)
        if run.key not in self._tried:
            started = time.perf_counter()
            tried = try_candidates(log, rows, *details, self.settings.plan_seconds)
            self._tried[run.key] = tried, time.perf_counter() - started
        method = self._tried[run.key][0][0].method
        return build_model(log, run.training, method, run.budget, run.seed, self._counts)

    def _learning_rates(self, run: Run) -> tuple[float, ...]:
        """All of them for the first seeds of a cell; what was best for these, for the others."""
        first = self.settings.seeds[:_TRYING_SEEDS]
        keys = [replace(run, seed=seed).key for seed in first]
        if run.seed in first or not all(key in self.results for key in keys):
            return run.training.learning_rates
        tried = [each for key in keys for each in self.results.records[key]["learning_rate_trials"]]
        scores = {
            rate: sum(each["auc"] for each in tried if each["learning_rate"] == rate)
            for rate in run.training.learning_rates
        }
        return (max(scores, key=scores.__getitem__),)


def _split(run: Run, log: ClickLog) -> Split:
    return log.split(
        "random" if run.training.split == "random" else "time",
        seed=run.seed,
        validation=run.training.validation,
        test=run.training.test,
    )


def _impossible_record(run: Run, error: BudgetError) -> Record:
    return {
        "key": run.key,
        "status": "impossible",
        "method": run.method,
        "budget": run.budget,
        "smallest_bytes": error.smallest,
        "seed": run.seed,
        "data": run.data,
        "message": str(error),
    }


def _checked_memory(run: Run, model: nn.Module) -> MemoryReport:
    """The model's bytes; a method that broke its promise stops the sweep."""
    size = memory(model)
    budget_bytes = parse_budget(run.budget, size.dense)
    if size.total > budget_bytes:
        raise AssertionError(
            f"{run.method} at {run.budget} takes {size.total} bytes, its budget is {budget_bytes}"
        )
    return size


def _lookup_settings(model: ClickModel) -> list[dict[str, Any]]:
    """What each table was made into, in words."""
    return [
        {"table": name, "method": bag.method, "bytes": bag.plan.bytes, "plan": str(bag.plan)}
        for name, bag in model.embeddings.embedding_bags.items()
        if isinstance(bag, EmbeddingBag)
    ]


def _result_record(
    run: Run,
    log: ClickLog,
    best: Trained,
    trials: list[dict[str, float]],
    size: MemoryReport,
    lookup: list[dict[str, Any]],
) -> Record:
    return {
        "key": run.key,
        "method": run.method,
        "budget": run.budget,
        "bytes": size.total,
        "budget_bytes": parse_budget(run.budget, size.dense),
        "dense_bytes": size.dense,
        "seed": run.seed,
        "data": run.data,
        "model": run.training.model,
        "auc": None,
        "logloss": None,
        "single_epoch": None,
        "train_seconds": best.train_seconds,
        "examples_per_second": best.examples / best.train_seconds,
        "learning_rate": best.learning_rate,
        "best_epoch": best.best_epoch,
        "epochs": len(best.validation),
        "phases": [asdict(phase) for phase in best.phases],
        "training_bytes": max(phase.training_bytes for phase in best.phases),
        "validation": validation_record(best),
        "learning_rate_trials": trials,
        "lookup": lookup,
        "rows": len(log),
        "teacher_auc": log.meta.get("teacher_auc"),
        "settings": jsonable(run.training.__dict__),
        **environment(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def run_sweep(
    settings: SweepSettings, directory: Path, *, cache: Path | None = None, quiet: bool = False
) -> Sweep:
    """Run a sweep, or what is missing of it.

    Args:
        settings: what to run.
        directory: where the records are; finished runs there are skipped.
        cache: prepared click logs (see :func:`embcompress.data.load_click_log`).
        quiet: show no progress.
    """
    with only_writer(directory), torch_threads(settings.threads):
        sweep = Sweep(settings, directory, cache)
        with SweepDisplay(quiet=quiet) as display:
            sweep.run(display)
    return sweep
