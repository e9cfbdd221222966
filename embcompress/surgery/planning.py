"""Planning the tables of a model by short trainings of copies of it."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from embcompress.budget import allocate
from embcompress.collection import full_plan
from embcompress.methods import Method
from embcompress.methods.auto import Auto
from embcompress.plan import LookupPlan
from embcompress.planner.lookups import count_lookups
from embcompress.planner.progress import PlanProgress, silent
from embcompress.planner.search import PlanSearch, QualitySearch
from embcompress.planner.trials import Trial, TrialData
from embcompress.surgery.table_building import Table, build_modules, put_in_place


@dataclass(frozen=True)
class Planned:
    """What short trainings chose.

    Attributes:
        tables: with the planner's method as it was set, and with counts.
        budget_bytes: for all tables together.
        tried: settings of the planner, the chosen one first.
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
    tables: Sequence[Table],
    budget_bytes: int | None,
    max_auc_loss: float | None,
    data: Iterable[Any],
    seconds: float,
    progress: bool,
) -> Planned:
    """Set the planner, and find the budget if there is none, by short trainings.

    Args:
        model: is copied for every training, without its tables.
        tables: those of the model that are to be swapped.
        budget_bytes: None where ``max_auc_loss`` says what must be kept.
        data: batches (inputs, labels).
        seconds: trainings end after so long.
        progress: whether to show it on standard error.

    Raises:
        ValueError: the planner is not the method of these tables.
    """
    planners = list(dict.fromkeys(each.method for each in tables if isinstance(each.method, Auto)))
    if len(planners) != 1:
        raise ValueError("data is for the planner; one method='auto' must be among the methods")
    if max_auc_loss is not None and any(each.method != planners[0] for each in tables):
        raise ValueError("max_auc_loss needs method='auto' for all tables that are swapped")
    show = PlanProgress(seconds) if progress else silent
    show("reading data")
    trial_data = TrialData.of(data)
    known = _counted(model, tables, trial_data)

    def plans_of(method: Method, limit: int) -> list[LookupPlan]:
        methods = [method if isinstance(each.method, Auto) else each.method for each in known]
        return allocate([each.spec for each in known], methods, limit, full_plan)

    def build(method: Method, limit: int) -> nn.Module:
        used = [replace(each, method=method) for each in known]
        return _copy_with_tables(model, used, plans_of(method, limit))

    def plans(method: Method, limit: int) -> Hashable:
        return tuple(plans_of(method, limit))

    def expected(method: Method, limit: int) -> float:
        assert isinstance(method, Auto)
        return method.expected_loss([each.spec for each in known], limit)

    dense = sum(each.spec.dense_bytes for each in known)
    search = PlanSearch(build, plans, expected, dense, trial_data, seconds, show)
    quality = None
    if budget_bytes is None:
        assert max_auc_loss is not None
        quality = search.smallest(planners[0], max_auc_loss)
        budget_bytes = quality.budget_bytes
    tried = search.settings(planners[0], budget_bytes)
    chosen = [
        replace(each, method=tried[0].method) if isinstance(each.method, Auto) else each
        for each in known
    ]
    return Planned(chosen, budget_bytes, tried, trial_data.examples, quality)


def _counted(model: nn.Module, tables: Sequence[Table], data: TrialData) -> list[Table]:
    """The tables with counts of their ids in the data, where none were given."""
    owners = {module: each for each in tables for module in each.candidate.modules}
    unknown = [module for module, each in owners.items() if each.spec.counts is None]
    if not unknown:
        return list(tables)
    seen = count_lookups(model, unknown, data.training)
    result = []
    for each in tables:
        counts = [seen[module] for module in each.candidate.modules if module in seen]
        spec = each.spec if not counts else replace(each.spec, counts=sum(counts[1:], counts[0]))
        result.append(replace(each, spec=spec))
    return result


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
