"""Which settings of the planner, and how many bytes: by short trainings of the model itself."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from embcompress.methods.base import Method
from embcompress.methods.full import Full
from embcompress.planner.choosing import choose, distinct
from embcompress.planner.options import table_options
from embcompress.planner.progress import Show, silent
from embcompress.planner.ranking import Ranking
from embcompress.planner.trial_data import TrialData, standard_error
from embcompress.planner.trials import (
    LEARNING_RATES,
    TRIAL_SEED,
    Build,
    Trial,
    best_learning_rate,
    full_training,
)
from embcompress.planner.worth import train_full_tables

#: Shares of the dense bytes at which the loss of AUC is measured first.
_LADDER = (0.25, 0.06, 0.015, 0.004, 0.001)
_REFINEMENTS = 3
#: Passes over the training examples, at most: fewer where the AUC has fallen after one.
_PASSES = 6
#: Plans that are expected to lose less of the tables' value, and whose AUC is no further below
#: that of full tables than so many standard errors, are as good: their AUCs are averaged.
_NOTHING = 1e-3
_ERRORS_APART = 2.0


@dataclass(frozen=True)
class Measurement:
    """What a plan of so many bytes loses.

    Attributes:
        bytes: the budget.
        expected: share of the tables' value that the planner expects to be lost.
        auc: of a short training.
        is_like_full: whether it cannot be told from the full tables, neither by the closed forms
            nor by the held-out examples.
    """

    bytes: int
    expected: float
    auc: float
    is_like_full: bool = False


@dataclass(frozen=True)
class QualitySearch:
    """How the fewest bytes were found that keep a quality.

    Attributes:
        budget_bytes: what was found.
        full_auc: of short trainings with uncompressed tables, and with plans that cannot be told
            from them: one AUC alone may be a lucky one.
        max_auc_loss: what may be lost of it.
        error: standard error of an AUC on the held-out examples; differences are known better.
        measurements: by falling bytes.
        learning_rate: of all these trainings; that with which the full tables learn best.
    """

    budget_bytes: int
    full_auc: float
    max_auc_loss: float
    error: float
    measurements: tuple[Measurement, ...]
    learning_rate: float

    def __str__(self) -> str:
        lines = [
            f"At most {self.max_auc_loss:g} of the full tables' AUC, {self.full_auc:.4f} after "
            f"short trainings at a learning rate of {self.learning_rate:g}, may be lost (a single "
            f"AUC has a standard error of {self.error:.4f}). Measured:"
        ]
        lines += [
            f"  {each.bytes:,} bytes lose {self.full_auc - each.auc:+.4f}"
            for each in self.measurements
        ]
        return "\n".join([*lines, f"so {self.budget_bytes:,} bytes."])


@dataclass
class PlanSearch:
    """Short trainings of one model with other tables.

    Attributes:
        build: makes the model with tables of a method in so many bytes, which know how often ids
            occur among the examples to be trained on.
        plans: for all examples, the same, its plans alone, in a form that compares.
        expected: share of the tables' value that a method in so many bytes is expected to lose;
            infinite where it cannot be made so small.
        dense_bytes: of the full tables.
        data: what is trained on and compared by.
        seconds: trainings end after so long.
        show: is told what is being done.
    """

    build: Callable[[Method, int, TrialData], nn.Module]
    plans: Callable[[Method, int], Hashable]
    expected: Callable[[Method, int], float]
    dense_bytes: int
    data: TrialData
    seconds: float
    show: Show = silent
    _end: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    def settings(self, method: Method, budget_bytes: int) -> list[Trial]:
        """The method with one or the other setting, the chosen one first."""

        def plans(each: Method) -> Hashable:
            return self.plans(each, budget_bytes)

        try:
            return self._settings(method, budget_bytes, plans)
        finally:
            table_options.cache_clear()  # settings share options, and they are many

    def _settings(
        self, method: Method, budget_bytes: int, plans: Callable[[Method], Hashable]
    ) -> list[Trial]:
        methods = distinct(method.candidates(), plans)
        if len(methods) == 1:
            return [Trial(methods[0])]
        with torch.random.fork_rng():
            learning_rate = LEARNING_RATES[0]
            if method.uses_worths:
                self.show("what each table is worth, with full tables")
                full = train_full_tables(self._seeded, self.dense_bytes, self.data, self._end)
                if full is not None:
                    learning_rate = full.learning_rate
                    methods = distinct(method.candidates(full.worths), plans)
            left = self._end - time.monotonic()
            build = self._builder(budget_bytes)
            return choose(methods, build, self.data, left, self.show, learning_rate)

    def smallest(self, method: Method, max_auc_loss: float) -> QualitySearch:
        """The fewest bytes that lose no more AUC than that.

        All trainings have the learning rate with which the full tables learn best. The loss is
        measured at a few budgets, and taken to rise with what the planner expects to
        be lost: never to fall, and in a straight line between two measurements. Where that line
        passes ``max_auc_loss`` it is measured again. What is lost is lost of the mean AUC of the
        full tables and of the plans that cannot be told from them.

        Raises:
            ValueError: the time was too short to train the model with full tables.
        """
        best = best_learning_rate(lambda rate: self._measure(Full(), self.dense_bytes, rate))
        if best is None:
            raise ValueError(
                f"plan_seconds={self.seconds:g} is too short for one training with full tables"
            )
        learning_rate, full = best
        measured = [Measurement(self.dense_bytes, 0.0, full.auc, is_like_full=True)]

        def add(budget_bytes: int) -> None:
            self._add(measured, method, budget_bytes, full, learning_rate)

        for share in _LADDER:
            add(int(share * self.dense_bytes))
        for _ in range(_REFINEMENTS):
            add(self._crossing(method, measured, max_auc_loss))
        found = self._crossing(method, measured, max_auc_loss)
        below = tuple(sorted(measured[1:], key=lambda each: -each.bytes))
        error = standard_error(self.data)
        auc = _full_auc(measured)
        return QualitySearch(found, auc, max_auc_loss, error, below, learning_rate)

    def _builder(self, budget_bytes: int) -> Build:
        return lambda method, data: self._seeded(method, budget_bytes, data)

    def _seeded(self, method: Method, budget_bytes: int, data: TrialData) -> nn.Module:
        torch.manual_seed(TRIAL_SEED)
        return self.build(method, budget_bytes, data)

    def _measure(self, method: Method, budget_bytes: int, learning_rate: float) -> Ranking | None:
        """Of a short training, the best after any pass; None if the time ran out."""
        self.show(f"what is lost in {budget_bytes:,} bytes")
        with torch.random.fork_rng():
            build = self._builder(budget_bytes)
            return full_training(
                method, build, self.data, self._end, _PASSES, learning_rate=learning_rate
            )

    def _add(
        self,
        measured: list[Measurement],
        method: Method,
        budget_bytes: int,
        full: Ranking,
        learning_rate: float,
    ) -> None:
        """Measure at that budget, if it is possible, new, and there is time."""
        if any(each.bytes == budget_bytes for each in measured):
            return
        expected = self.expected(method, budget_bytes)
        if expected == math.inf:
            return
        found = self._measure(method, budget_bytes, learning_rate)
        if found is not None:
            lead, error = full.lead(found)
            is_like_full = expected < _NOTHING and lead <= _ERRORS_APART * error
            measured.append(Measurement(budget_bytes, expected, found.auc, is_like_full))

    def _crossing(self, method: Method, measured: list[Measurement], max_auc_loss: float) -> int:
        """The fewest bytes whose loss, read off the measured line, is within the limit."""
        ordered = sorted(measured, key=lambda each: (each.expected, -each.bytes))
        expected = np.array([each.expected for each in ordered])
        full = _full_auc(measured)
        lost = np.maximum.accumulate(
            [0.0 if each.is_like_full else full - each.auc for each in ordered]
        )
        within = int((lost <= max_auc_loss).sum()) - 1  # the full tables are always within
        limit = float(expected[within])
        if within + 1 < len(ordered) and lost[within + 1] > lost[within]:
            share = (max_auc_loss - lost[within]) / (lost[within + 1] - lost[within])
            limit += share * float(expected[within + 1] - expected[within])
        low, high = 1, self.dense_bytes
        while low < high:
            middle = (low + high) // 2
            is_enough = self.expected(method, middle) <= limit + 1e-9
            low, high = (low, middle) if is_enough else (middle + 1, high)
        return low


def _full_auc(measured: Sequence[Measurement]) -> float:
    return statistics.fmean(each.auc for each in measured if each.is_like_full)
