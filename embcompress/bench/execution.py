"""One run of a sweep, from its settings to its record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from embcompress.bench.lookup import LookupTimer, lookup_settings
from embcompress.bench.outcomes import Finished, error_record, impossible_record, result_record
from embcompress.bench.planning import try_candidates
from embcompress.bench.prequential import train_prequential
from embcompress.bench.records import Record
from embcompress.bench.settings import Run
from embcompress.bench.training import (
    StepObserver,
    Trained,
    build_model,
    count_ids,
    deployed,
    sample_co_occurrence,
    test_scores,
    train,
)
from embcompress.budget import BudgetError, parse_budget
from embcompress.data.click_log import ClickLog, Split
from embcompress.data.load import load_click_log
from embcompress.memory import MemoryReport, memory
from embcompress.methods import resolve_method
from embcompress.models import ClickModel
from embcompress.planner.trials import Trial

#: Gives what is called after the steps of a run's training at some learning rate.
Observers = Callable[[Run, float], StepObserver | None]


def no_observer(run: Run, learning_rate: float) -> None:
    """Observes no training."""


class DivergedError(ArithmeticError):
    """A training whose numbers are not finite, at every learning rate."""


class Executor:
    """Executes runs one after another; keeps what runs on the same data have in common.

    Args:
        cache: prepared click logs.
        plan_seconds: see :class:`~embcompress.bench.settings.SweepSettings`.
    """

    def __init__(self, cache: Path | None, plan_seconds: float) -> None:
        self.cache, self.plan_seconds = cache, plan_seconds
        self._log: tuple[str, ClickLog] | None = None
        self._timer: tuple[tuple[str, int], LookupTimer] | None = None
        self._counts: tuple[object, dict[str, Tensor]] | None = None
        self._planned: dict[str, tuple[list[Trial], float]] = {}
        self._co_occurrence: tuple[object, dict[str, Tensor]] | None = None

    def execute(self, run: Run, observers: Observers = no_observer) -> Record:
        """The record of a run that finished, cannot be, or failed.

        Whatever is wrong with one method, or with this machine for a moment, is no reason to
        lose the others' runs: an error becomes a record.
        """
        log = self._click_log(run.data)
        try:
            return _Execution(self, run, log, observers).record()
        except Exception as error:
            return error_record(run, error)

    def _click_log(self, data: str) -> ClickLog:
        if self._log is None or self._log[0] != data:
            self._log = data, load_click_log(data, cache=self.cache)
        return self._log[1]

    def timer(self, run: Run, log: ClickLog) -> LookupTimer:
        """Of tables for this run's features."""
        key = run.data, run.training.embedding_dim
        if self._timer is None or self._timer[0] != key:
            self._timer = key, LookupTimer(log, run.training.embedding_dim)
        return self._timer[1]

    def counts(self, run: Run, log: ClickLog, split: Split) -> dict[str, Tensor]:
        """How often each id occurs in the training rows."""
        key = run.data, run.seed, run.training
        if self._counts is None or self._counts[0] != key:
            self._counts = key, count_ids(log, split.train)
        return self._counts[1]

    def planned(
        self, run: Run, log: ClickLog, split: Split, counts: dict[str, Tensor]
    ) -> tuple[list[Trial], float]:
        """What was tried, and how long it took; once for all runs of the same training rows."""
        key = run.key if run.training.split == "random" else replace(run, seed=0).key
        if key not in self._planned:
            started = time.perf_counter()
            details = (run.training, run.method, run.budget, counts)
            tried = try_candidates(log, split, *details, self.plan_seconds)
            self._planned[key] = tried, time.perf_counter() - started
        return self._planned[key]

    def co_occurrence(self, run: Run, log: ClickLog, split: Split) -> dict[str, Tensor]:
        """What ids occur with in the training rows."""
        key = run.data, run.seed, run.training
        if self._co_occurrence is None or self._co_occurrence[0] != key:
            self._co_occurrence = key, sample_co_occurrence(log, split.train)
        return self._co_occurrence[1]


class _Execution:
    """One run while it is executed."""

    def __init__(self, executor: Executor, run: Run, log: ClickLog, observers: Observers) -> None:
        self.executor, self.run, self.log, self.observers = executor, run, log, observers
        self.split = split_of(run, log)
        self.counts = executor.counts(run, log, self.split)
        self.tried: tuple[list[Trial], float] = [], 0.0

    def record(self) -> Record:
        try:
            self.tried = self.executor.planned(self.run, self.log, self.split, self.counts)
            model = self._build()
        except BudgetError as error:
            return impossible_record(self.run, error)
        best: Trained | None = None  # the others' weights are let go
        trials: list[dict[str, float]] = []
        for learning_rate in self.run.training.learning_rates:
            trained = self._train(self._build() if trials else model, learning_rate)
            trial = {"learning_rate": learning_rate, "auc": 0.0, "train_seconds": 0.0}
            if trained is not None:
                trial |= {"auc": trained.best_auc, "train_seconds": trained.train_seconds}
            trials.append(trial)
            if trained is not None and (best is None or trained.best_auc > best.best_auc):
                best = trained
        if best is None:
            rates = self.run.training.learning_rates
            raise DivergedError(f"training diverged at every learning rate: {rates}")
        scores = test_scores(best, self.log, self.split.test)
        served = deployed(best, best.best_epoch)
        assert isinstance(served, ClickModel)
        size = checked_memory(self.run, served)
        lookup = lookup_settings(served.embeddings)
        speed = self.executor.timer(self.run, self.log).measure(served.embeddings)
        finished = Finished(best, scores, trials, size, lookup, speed, self.tried)
        return result_record(self.run, self.log, finished)

    def _build(self) -> ClickModel:
        """A new model; the tables know how often each id occurs in the training rows."""
        run, method = self.run, self.tried[0][0].method
        company = None
        if resolve_method(method).uses_co_occurrence:
            company = self.executor.co_occurrence(run, self.log, self.split)
        details = (run.budget, run.seed, self.counts, company)
        model = build_model(self.log, run.training, method, *details)
        checked_memory(run, model)
        return model

    def _train(self, model: ClickModel, learning_rate: float) -> Trained | None:
        """A training; None where it diverged."""
        run = self.run
        details = (model, self.log, self.split, run.training, learning_rate)
        observe = self.observers(run, learning_rate)
        try:
            if run.training.split == "prequential":
                trained = train_prequential(*details, observe)
            else:
                trained = train(*details, run.seed, observe)
        except Exception:
            if _is_finite(model):
                raise
            return None  # what a method does with numbers that are none is no error of its own
        return None if trained.diverged else trained


def _is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def split_of(run: Run, log: ClickLog) -> Split:
    """The rows that a run is trained, chosen and tested on.

    Raises:
        ValueError: the log cannot be split so.
    """
    training = run.training
    kind = "time" if training.split == "prequential" else training.split
    return log.split(
        kind,  # type: ignore[arg-type]
        seed=run.seed,
        validation=training.validation,
        test=training.test,
    )


def checked_memory(run: Run, model: nn.Module) -> MemoryReport:
    """The model's bytes.

    Raises:
        AssertionError: they are more than the budget; the method broke its promise.
    """
    size = memory(model)
    budget_bytes = parse_budget(run.budget, size.dense)
    if size.total > budget_bytes:
        raise AssertionError(
            f"{run.method} at {run.budget} takes {size.total} bytes, its budget is {budget_bytes}"
        )
    return size
