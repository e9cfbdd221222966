"""``compress()``: find the tables of a model and swap them under one budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from embcompress.approximation.fitting import relative_error
from embcompress.budget import Budget, allocate, format_bytes, parse_budget
from embcompress.collection import full_plan
from embcompress.methods import TableSpec
from embcompress.methods.auto import Auto
from embcompress.plan import LookupPlan
from embcompress.planner.explanation import Explanation, Tried
from embcompress.surgery.compression_report import CompressionReport, TableChange
from embcompress.surgery.planning import Planned, plan_with_data
from embcompress.surgery.table_building import Table, build_modules, put_in_place
from embcompress.surgery.table_finding import (
    Candidate,
    MethodChoice,
    choose_methods,
    find_candidates,
    torchrec_swapping,
)
from embcompress.tables.compressed_table import CompressedTable
from embcompress.tables.store_tensors import dtype_name


def compress(
    model: nn.Module,
    *,
    method: MethodChoice | Mapping[str, MethodChoice] = "auto",
    budget: Budget | None = None,
    max_auc_loss: float | None = None,
    data: Iterable[Any] | None = None,
    plan_seconds: float = 100.0,
    seed: int = 0,
    counts: Mapping[str, Tensor] | None = None,
    co_occurrence: Mapping[str, Tensor] | None = None,
    keep_weights: bool = False,
    progress: bool = True,
) -> CompressionReport:
    """Swap the embedding tables of a model for compressed ones, in place.

    Finds ``nn.Embedding``, ``nn.EmbeddingBag`` and this library's uncompressed tables anywhere
    in the model, and TorchRec's collections, which become those of :mod:`embcompress.torchrec`
    (before the model is sharded). Tables that share a weight stay tied. The new tables start from
    random values with the standard deviation of the old ones, or with ``keep_weights`` from the
    old ones themselves: train the model afterwards, and create its optimizer after this call.
    Nothing is changed if an error is raised.

    Args:
        model: a module that contains tables.
        method: one method for all tables (by default ``"auto"``, the planner's choice for them
            together), or ``{pattern: method}`` over module paths
            (``fnmatch`` patterns, the first match counts; tables without a match are left alone
            and outside the budget).
        budget: bytes for all these tables together, as in :class:`~embcompress.EmbeddingBag`.
            A table is left full where that is the better use of bytes.
        max_auc_loss: instead of a budget: as few bytes as keep the model's AUC so far, by short
            trainings on ``data``.
        data: batches ``(inputs, labels)`` of training data, such as a ``DataLoader`` yields, the
            first 2^19 examples of which are used. Inputs are a tensor, a tuple of the model's
            arguments or a dict of named ones. The model is called with them, not trained, to see
            ``counts`` and ``co_occurrence`` where these are not given. The planner tries its plans
            on them besides, and compares by their last tenth; its labels are 0 or 1, (B,) or
            (B, 1), and the model returns logits of that shape.
        plan_seconds: the planner's trainings end after so long.
        seed: hash keys are derived from it and from the tables' paths. The planner's random numbers
            are its own: the same data give the same plan.
        counts: for any of the tables, by path, (rows,) how often each id occurs in the training
            data; for methods that treat frequent ids better.
        co_occurrence: for any of the tables, by path, (rows, k) what each id occurs with, as
            :class:`embcompress.approximation.co_occurrence.CoOccurrence` samples it in one pass and
            bounded memory; for methods that address by likeness (``lma``, ``anchors``). The report
            names the tables that miss it.
        keep_weights: start from the trained tables: each new table approximates the old one as
            well as its method can (:meth:`embcompress.Method.fit`), and the report says how well.
        progress: whether work with ``data`` says on standard error what it does.

    Returns:
        A report that prints as a table and says why a table was left alone.

    Raises:
        BudgetError: the budget cannot be met; the error names the smallest that can.
        ValueError: the model is itself a table, has none, a pattern matches none, or arguments
            that do not go together.
    """
    if isinstance(model, (nn.Embedding, nn.EmbeddingBag, CompressedTable)):
        raise ValueError(
            "model is itself a table, which cannot be swapped in place; create "
            "ec.Embedding or ec.EmbeddingBag with method= and budget= instead"
        )
    torchrec = torchrec_swapping()
    if torchrec is not None and isinstance(model, torchrec.COLLECTIONS):
        raise ValueError(
            "model is itself a collection, which cannot be swapped in place; put it into a module, "
            "such as nn.ModuleDict({'tables': collection})"
        )
    _check_arguments(budget, max_auc_loss, data is not None, plan_seconds)
    candidates = find_candidates(model)
    if not candidates:
        raise ValueError(_nothing_to_swap(model))
    choose_methods(candidates, method)
    for argument, known in (("counts", counts), ("co_occurrence", co_occurrence)):
        _check_paths(argument, candidates, known or {})
    tables = [
        Table(
            candidate,
            candidate.method,
            _table_spec(candidate, seed, counts or {}, co_occurrence or {}),
        )
        for candidate in candidates
        if not candidate.refusal and candidate.method is not None
    ]
    dense = sum(table.spec.dense_bytes for table in tables)
    limit = None if budget is None else parse_budget(budget, dense)
    if keep_weights:
        _check_trained(tables, data is not None)
        tables = [replace(each, method=each.method.for_trained_tables()) for each in tables]
    planned = None
    if data is not None:
        planned = plan_with_data(
            model, candidates, tables, limit, max_auc_loss, data, plan_seconds, progress
        )
        tables, limit = planned.tables, planned.budget_bytes
    assert limit is not None
    plans = allocate(
        [each.spec for each in tables], [each.method for each in tables], limit, full_plan
    )
    if keep_weights:
        _check_fits(plans)
    by_candidate = {
        id(table.candidate): (table, plan) for table, plan in zip(tables, plans, strict=True)
    }
    replacements: dict[nn.Module, nn.Module] = {}
    changes = []
    shared: set[str] = set()
    for candidate in candidates:
        table, plan = by_candidate.get(id(candidate), (None, None))
        if table is None or plan is None or plan.is_dense:
            changes.append(_left_alone(candidate))
            continue
        built = build_modules(table, plan, keep_weights)
        replacements.update(built)
        error = None
        if keep_weights:
            error = _fit_error(candidate, table.spec, next(iter(built.values())))
        changes.append(_changed(table, plan, shared, error))
    put_in_place(model, replacements)
    return CompressionReport(tuple(changes), limit, _explain(tables, plans, planned))


def _nothing_to_swap(model: nn.Module) -> str:
    nothing = "the model contains no nn.Embedding or nn.EmbeddingBag"
    if any(isinstance(module, CompressedTable) for module in model.modules()):
        return f"{nothing}; its tables are compressed already: call compress on a new model"
    return nothing


def _check_arguments(
    budget: Budget | None,
    max_auc_loss: float | None,
    has_data: bool,
    plan_seconds: float,
) -> None:
    if (budget is None) == (max_auc_loss is None):
        raise ValueError("give either budget or max_auc_loss")
    if max_auc_loss is not None and not max_auc_loss > 0:
        raise ValueError(f"max_auc_loss must be positive, got {max_auc_loss}")
    if max_auc_loss is not None and not has_data:
        raise ValueError("max_auc_loss is measured on data; give data=batches of (inputs, labels)")
    if not plan_seconds > 0:
        raise ValueError(f"plan_seconds must be positive, got {plan_seconds}")


def _check_trained(tables: Sequence[Table], has_data: bool) -> None:
    if has_data and any(isinstance(each.method, Auto) for each in tables):
        raise ValueError(
            "method='auto' trains plans on data from the start, and keep_weights goes on from "
            "trained tables; leave one of them out"
        )


def _explain(
    tables: Sequence[Table], plans: Sequence[LookupPlan], planned: Planned | None
) -> tuple[Explanation, ...]:
    """An explanation for each planner among the methods."""
    explanations = []
    for planner in dict.fromkeys(each.method for each in tables):
        if not isinstance(planner, Auto):
            continue
        own = [number for number, each in enumerate(tables) if each.method == planner]
        explanation = planner.explain([tables[k].spec for k in own], [plans[k] for k in own])
        if planned is not None:
            explanation = replace(
                explanation,
                tried=tuple(Tried(str(t.method), t.passes, t.auc, t.lead) for t in planned.tried),
                examples=planned.examples,
                quality="" if planned.quality is None else str(planned.quality),
            )
        explanations.append(explanation)
    return tuple(explanations)


def _check_paths(argument: str, candidates: list[Candidate], known: Mapping[str, Tensor]) -> None:
    paths = [path for candidate in candidates for path in candidate.paths]
    unknown = sorted(set(known) - set(paths))
    if unknown:
        raise ValueError(f"{argument} name {unknown}, which are no tables; tables: {paths}")


def _table_spec(
    candidate: Candidate,
    seed: int,
    counts: Mapping[str, Tensor],
    co_occurrence: Mapping[str, Tensor],
) -> TableSpec:
    rows, width = candidate.weight.shape
    own, company = (
        next((known[path] for path in candidate.paths if path in known), None)
        for known in (counts, co_occurrence)
    )
    dtype = dtype_name(candidate.weight.dtype)
    return TableSpec(rows, width, candidate.paths[0], seed, dtype, own, co_occurrence=company)


def _left_alone(candidate: Candidate) -> TableChange:
    rows, width = candidate.weight.shape
    size = candidate.weight.untyped_storage().nbytes()
    name, *also = candidate.paths
    full = candidate.method is not None and candidate.method.name == "full"
    note = candidate.refusal or ("" if full else "small: better left full")
    return TableChange(name, rows, width, "full", size, size, note, tuple(also))


def _changed(table: Table, plan: LookupPlan, shared: set[str], error: float | None) -> TableChange:
    """What became of a table; ``shared`` are the stores that were counted, and grows."""
    candidate = table.candidate
    rows, width = candidate.weight.shape
    name, *also = candidate.paths
    after = sum(s.bytes for s in plan.stores if s.shared not in shared and not s.is_in_file)
    shared.update(store.shared for store in plan.stores if store.shared)
    notes = ["tied tables stay tied"] if len(candidate.modules) > 1 else []
    if table.method.uses_co_occurrence and table.spec.co_occurrence is None:
        notes.append("no likeness is known: give data= or co_occurrence=")
    if table.method.procedure_kind and error is None:  # a trained table serves as it is
        notes.append("train it with ec.TrainingProcedure")
    if plan.offloaded:
        notes.append(f"{format_bytes(plan.offloaded)} in a file")
    return TableChange(
        name, rows, width, table.method.name, candidate.weight.untyped_storage().nbytes(),
        after, ", ".join(notes), tuple(also), error,
    )  # fmt: skip


def _check_fits(plans: Iterable[LookupPlan]) -> None:
    names = [store.shared for plan in plans for store in plan.stores if store.shared]
    if len(set(names)) < len(names):
        raise ValueError(
            "keep_weights fits one table at a time, and these share a store; choose another "
            "method, or keep_weights=False"
        )


def _fit_error(candidate: Candidate, table: TableSpec, new: nn.Module) -> float:
    assert isinstance(new, CompressedTable)
    return relative_error(candidate.weight.detach(), new.vectors, table.counts)
