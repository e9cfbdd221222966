"""What data are good for: statistics of ids, and plans chosen by short trainings of copies."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from embcompress.budget import allocate
from embcompress.collection import full_plan
from embcompress.methods import Method
from embcompress.methods.auto import Auto
from embcompress.plan import LookupPlan
from embcompress.planner.progress import PlanProgress, Show, silent
from embcompress.planner.search import PlanSearch, QualitySearch
from embcompress.planner.trial_data import Example, TrialData, first_batches
from embcompress.planner.trials import Trial
from embcompress.surgery.id_statistics import with_statistics
from embcompress.surgery.table_building import Table, build_modules, put_in_place
from embcompress.surgery.table_finding import Candidate


@dataclass(frozen=True)
class Planned:
    """What data led to.

    Attributes:
        tables: with statistics of their ids, and with the planner as it was set.
        budget_bytes: for all tables together.
        tried: settings of the planner, the chosen one first; none without a planner.
        examples: number of examples that they were trained on.
        quality: how the bytes were found, where a quality was asked for.
    """

    tables: list[Table]
    budget_bytes: int
    tried: list[Trial]
    examples: int
    quality: QualitySearch | None


def plan_with_data(
    model: nn.Module,
    candidates: Sequence[Candidate],
    tables: Sequence[Table],
    budget_bytes: int | None,
    max_auc_loss: float | None,
    data: Iterable[Example],
    seconds: float,
    progress: bool,
) -> Planned:
    """See what the data say of the tables' ids, and set the planner, where it is among the methods.

    Args:
        model: is copied for every training, without its tables.
        candidates: all its tables.
        tables: those that are to be swapped.
        budget_bytes: None where ``max_auc_loss`` says what must be kept.
        data: batches (inputs, labels).
        seconds: the planner's trainings end after so long.
        progress: whether to show it on standard error.

    Raises:
        ValueError: there are several planners, or ``max_auc_loss`` with another method.
    """
    planners = list(dict.fromkeys(each.method for each in tables if isinstance(each.method, Auto)))
    if len(planners) > 1:
        raise ValueError(
            "data is for one planner: give method='auto' the same settings for all tables; got "
            f"{len(planners)} different ones"
        )
    if max_auc_loss is not None and any(each.method not in planners for each in tables):
        raise ValueError("max_auc_loss needs method='auto' for all tables that are swapped")
    show = PlanProgress(seconds if planners else None) if progress else silent
    show("reading data")
    if planners:
        trial_data = TrialData.of(data)
        statistics = _KnownTables(model, candidates, tables, trial_data, show)
        return _planned(
            model, statistics, planners[0], budget_bytes, max_auc_loss, trial_data, seconds, show
        )
    assert budget_bytes is not None
    known = with_statistics(model, candidates, tables, first_batches(data), show)
    return Planned(known, budget_bytes, [], 0, None)


class _KnownTables:
    """The tables that are to be swapped, with statistics of some examples' ids."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Sequence[Candidate],
        tables: Sequence[Table],
        data: TrialData,
        show: Show,
    ) -> None:
        self._details = model, candidates, tables
        self._whole = data, with_statistics(*self._details, data.training, show)
        self._part = self._whole

    def of(self, data: TrialData) -> list[Table]:
        """The tables, with statistics of the examples to be trained on; the last are kept."""
        if data is not self._part[0]:
            is_whole = data is self._whole[0]
            found = self._whole[1] if is_whole else with_statistics(*self._details, data.training)
            self._part = data, found
        return self._part[1]


def _planned(
    model: nn.Module,
    known: _KnownTables,
    planner: Auto,
    budget_bytes: int | None,
    max_auc_loss: float | None,
    data: TrialData,
    seconds: float,
    show: Show,
) -> Planned:
    """Settings of the planner, and the budget if there is none, by short trainings."""

    tables = known.of(data)

    def planned_by(method: Method, tables: Sequence[Table] = tables) -> list[Table]:
        return [
            replace(each, method=method) if isinstance(each.method, Auto) else each
            for each in tables
        ]

    @functools.cache
    def plans(method: Method, limit: int) -> tuple[LookupPlan, ...]:
        methods = [each.method for each in planned_by(method)]
        return tuple(allocate([each.spec for each in tables], methods, limit, full_plan))

    def build(method: Method, limit: int, part: TrialData) -> nn.Module:
        # Which ids have rows of their own follows from what the copy is to be trained on.
        return _copy_with_tables(model, planned_by(method, known.of(part)), plans(method, limit))

    def expected(method: Method, limit: int) -> float:
        assert isinstance(method, Auto)
        return method.expected_loss([each.spec for each in tables], limit)

    dense = sum(each.spec.dense_bytes for each in tables)
    search = PlanSearch(build, plans, expected, dense, data, seconds, show)
    quality = None
    if budget_bytes is None:
        assert max_auc_loss is not None
        quality = search.smallest(planner, max_auc_loss)
        budget_bytes = quality.budget_bytes
    tried = search.settings(planner, budget_bytes)
    return Planned(planned_by(tried[0].method), budget_bytes, tried, data.examples, quality)


def _copy_with_tables(
    model: nn.Module, tables: Sequence[Table], plans: Sequence[LookupPlan]
) -> nn.Module:
    """A copy of a model, new tables in place of the old, which are not copied."""
    replacements: dict[nn.Module, nn.Module] = {}
    for table, plan in zip(tables, plans, strict=True):
        replacements.update(build_modules(table, plan))
    # deepcopy takes what is in memo as copied already.
    copied = copy.deepcopy(model, {id(old): new for old, new in replacements.items()})
    put_in_place(copied, replacements)
    return copied
