"""``compress()``: find the tables of a model and swap them under one budget."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from embcompress.budget import Budget, allocate, format_bytes, parse_budget
from embcompress.collection import full_plan
from embcompress.fitting import relative_error
from embcompress.memory import storage_key
from embcompress.methods import Method, TableSpec, resolve_method
from embcompress.methods.auto import Auto
from embcompress.modules import (
    CompressedTable,
    Embedding,
    EmbeddingBag,
    dtype_name,
    tie_shared_stores,
)
from embcompress.plan import LookupPlan, Pool
from embcompress.planner.explanation import Explanation
from embcompress.text_table import text_table

MethodChoice = str | Method
_TABLES = (nn.Embedding, nn.EmbeddingBag, Embedding, EmbeddingBag)
#: Deviation of the start values where the table's own is zero or unknown.
_FALLBACK_STD = 0.01


@dataclass(frozen=True)
class TableChange:
    """What :func:`compress` did with one table.

    Attributes:
        name: path of the module; further paths to it, or to modules tied to it, in ``also``.
        rows, width: shape of the dense table.
        method: the method it has now (``"full"``: left as it was).
        before, after: resident bytes; a store that tables share counts for the first of them.
        error: relative error of the vectors, √(Σ c·|v − w|² / Σ c·|w|²) over ids, where the
            table started from the old weights; c are the counts, where known, else 1.
        note: why it was left alone, or what a reader should know.
    """

    name: str
    rows: int
    width: int
    method: str
    before: int
    after: int
    note: str = ""
    also: tuple[str, ...] = ()
    error: float | None = None


def _notes(table: TableChange) -> list[str]:
    error = "" if table.error is None else f"error {table.error:.1%}"
    return [note for note in (table.note, error, *(f"also {path}" for path in table.also)) if note]


@dataclass(frozen=True)
class CompressionReport:
    """What :func:`compress` did; prints as a table."""

    tables: tuple[TableChange, ...] = field(default_factory=tuple)
    budget: int = 0
    explanations: tuple[Explanation, ...] = ()

    @property
    def before(self) -> int:
        """Bytes of all tables before."""
        return sum(table.before for table in self.tables)

    @property
    def after(self) -> int:
        """Bytes of all tables after."""
        return sum(table.after for table in self.tables)

    def explain(self) -> str:
        """In words, where the bytes went and what else there was, as far as the planner chose.

        For a picture: ``report.explanations[0].plot("plan.png")``.
        """
        if not self.explanations:
            return "Nothing was planned: the methods were given. method='auto' plans."
        return "\n\n".join(map(str, self.explanations))

    def __str__(self) -> str:
        rows = [
            (t.name, t.rows, t.width, t.method, format_bytes(t.before), format_bytes(t.after), note)
            for t in self.tables
            for note in [", ".join(_notes(t))]
        ]
        share = f"{self.after / self.before:.4%}" if self.before else ""
        total = ("total", "", "", share, format_bytes(self.before), format_bytes(self.after), "")
        header = ("table", "rows", "width", "method", "before", "after", "note")
        return text_table(header, [*rows, total])


@dataclass
class _Candidate:
    """Tables with one weight, and every path that leads to them."""

    modules: dict[nn.Module, list[str]]
    weight: Tensor
    refusal: str = ""
    method: Method | None = None

    @property
    def paths(self) -> list[str]:
        return [path for paths in self.modules.values() for path in paths]

    @property
    def first(self) -> nn.Module:
        return next(iter(self.modules))


def compress(
    model: nn.Module,
    *,
    method: MethodChoice | Mapping[str, MethodChoice] = "auto",
    budget: Budget,
    seed: int = 0,
    counts: Mapping[str, Tensor] | None = None,
    keep_weights: bool = False,
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
        seed: hash keys are derived from it and from the tables' paths.
        counts: for any of the tables, by path, (rows,) how often each id occurs in the training
            data; for methods that treat frequent ids better.
        keep_weights: start from the trained tables: each new table approximates the old one as
            well as its method can (:meth:`embcompress.Method.fit`), and the report says how well.

    Returns:
        A report that prints as a table and says why a table was left alone.

    Raises:
        BudgetError: the budget cannot be met; the error names the smallest that can.
        ValueError: the model is itself a table, has none, or a pattern matches none.
    """
    if isinstance(model, (nn.Embedding, nn.EmbeddingBag, CompressedTable)):
        raise ValueError(
            "model is itself a table, which cannot be swapped in place; create "
            "ec.Embedding or ec.EmbeddingBag with method= and budget= instead"
        )
    torchrec = _torchrec()
    if torchrec is not None and isinstance(model, torchrec.COLLECTIONS):
        raise ValueError(
            "model is itself a collection, which cannot be swapped in place; put it into a module, "
            "such as nn.ModuleDict({'tables': collection})"
        )
    candidates = _find_candidates(model)
    if not candidates:
        raise ValueError("the model contains no nn.Embedding or nn.EmbeddingBag")
    _choose_methods(candidates, method)
    chosen = [candidate for candidate in candidates if not candidate.refusal]
    _check_counts(candidates, counts or {})
    specs = {id(candidate): _table_spec(candidate, seed, counts or {}) for candidate in chosen}
    limit = parse_budget(budget, sum(spec.dense_bytes for spec in specs.values()))
    methods = [candidate.method for candidate in chosen if candidate.method is not None]
    if keep_weights:
        methods = [each.for_trained_tables() for each in methods]
    allocated = allocate(list(specs.values()), methods, limit, full_plan)
    plans = dict(zip(specs, allocated, strict=True))
    if keep_weights:
        _check_fits(plans.values())
    replacements: dict[nn.Module, nn.Module] = {}
    changes = []
    shared: set[str] = set()
    for candidate in candidates:
        plan = plans.get(id(candidate))
        if plan is None or plan.is_dense:
            changes.append(_left_alone(candidate))
            continue
        spec = specs[id(candidate)]
        built = _build(candidate, spec, plan, keep_weights)
        replacements.update(built)
        error = _fit_error(candidate, spec, next(iter(built.values()))) if keep_weights else None
        changes.append(_changed(candidate, plan, shared, error))
    tie_shared_stores(new for new in replacements.values() if isinstance(new, CompressedTable))
    swap_modules(model, replacements)
    if torchrec is not None:
        swap_modules(model, torchrec.compressed_collections(model))
    explanations = _explain(list(specs.values()), methods, allocated)
    return CompressionReport(tuple(changes), limit, explanations)


def _torchrec() -> ModuleType | None:
    """What there is to do about TorchRec's collections; None where no model can have any."""
    if "torchrec.modules.embedding_modules" not in sys.modules:
        return None
    return importlib.import_module("embcompress.torchrec.swapping")


def _explain(
    tables: Sequence[TableSpec], methods: Sequence[Method], plans: Sequence[LookupPlan]
) -> tuple[Explanation, ...]:
    """An explanation for each planner among the methods."""
    explanations = []
    for planner in dict.fromkeys(each for each in methods if isinstance(each, Auto)):
        own = [number for number, each in enumerate(methods) if each == planner]
        explanations.append(planner.explain([tables[k] for k in own], [plans[k] for k in own]))
    return tuple(explanations)


# -------------------------------------------------------------------------------------- finding


def _find_candidates(model: nn.Module) -> list[_Candidate]:
    """Tables grouped by the storage of their weight."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_table(module):
            paths.setdefault(module, []).append(path)
    groups: dict[tuple[str, int], _Candidate] = {}
    for module, names in paths.items():
        weight = _dense_weight(module)
        group = groups.setdefault(storage_key(weight), _Candidate({}, weight))
        group.modules[module] = names
    owners = _parameter_owners(model)
    torchrec = _torchrec()
    refused = {} if torchrec is None else torchrec.refusals(model)
    for key, group in groups.items():
        # A parametrized weight is computed anew at every access, and nothing owns it.
        group.refusal = _refusal(group, owners.get(key, []), refused)
    return list(groups.values())


def _is_table(module: nn.Module) -> bool:
    if isinstance(module, CompressedTable):
        return module.plan.is_dense
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _dense_weight(module: nn.Module) -> Tensor:
    if isinstance(module, CompressedTable):
        return next(iter(module.stores().values()))
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _parameter_owners(model: nn.Module) -> dict[tuple[str, int], list[tuple[nn.Module, str]]]:
    """Every (module, parameter path) that holds each storage."""
    owners: dict[tuple[str, int], list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            full_name = f"{path}.{name}" if path else name
            owners.setdefault(storage_key(tensor), []).append((module, full_name))
    return owners


def _refusal(
    group: _Candidate, owners: list[tuple[nn.Module, str]], refused: Mapping[nn.Module, str]
) -> str:
    """Why the tables of a group cannot be swapped; empty if they can.

    ``refused`` are tables that cannot for what they are in.
    """
    outside = [name for module, name in owners if module not in group.modules]
    if outside:
        return f"tied to {', '.join(outside)}"
    shapes = {tuple(_dense_weight(module).shape) for module in group.modules}
    if len(shapes) > 1:
        return "tied to a table of another shape"
    reasons = [
        reason
        for module in group.modules
        if (reason := refused.get(module) or _module_refusal(module))
    ]
    return reasons[0] if reasons else ""


def _module_refusal(module: nn.Module) -> str:
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if type(module) not in _TABLES:
        return f"{type(module).__name__} is a subclass that may compute something else"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "it has hooks"
    options = module.options if isinstance(module, CompressedTable) else module
    if options.max_norm is not None:
        return "max_norm needs the dense table"
    if options.scale_grad_by_freq:
        return "scale_grad_by_freq needs the dense table"
    if not _dense_weight(module).requires_grad:
        return "its weight is frozen, and would become random"
    if not _dense_weight(module).is_floating_point():
        return "its weight is not floating point"
    return ""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _choose_methods(
    candidates: list[_Candidate], method: MethodChoice | Mapping[str, MethodChoice]
) -> None:
    patterns = method if isinstance(method, Mapping) else {"*": method}
    resolved = {pattern: resolve_method(choice) for pattern, choice in patterns.items()}
    unused = set(resolved)
    for candidate in candidates:
        matching = [p for p in resolved if any(fnmatchcase(path, p) for path in candidate.paths)]
        unused -= set(matching)
        if matching:
            candidate.method = resolved[matching[0]]
        elif not candidate.refusal:
            candidate.refusal = "no pattern matches"
    if unused:
        paths = [path for candidate in candidates for path in candidate.paths]
        raise ValueError(f"patterns {sorted(unused)} match no table; tables: {paths}")
    if all(candidate.refusal for candidate in candidates):
        reasons = "; ".join(f"{c.paths[0]}: {c.refusal}" for c in candidates)
        raise ValueError(f"no table can be compressed: {reasons}")


# ------------------------------------------------------------------------------------- swapping


def _check_counts(candidates: list[_Candidate], counts: Mapping[str, Tensor]) -> None:
    paths = [path for candidate in candidates for path in candidate.paths]
    unknown = sorted(set(counts) - set(paths))
    if unknown:
        raise ValueError(f"counts name {unknown}, which are no tables; tables: {paths}")


def _table_spec(candidate: _Candidate, seed: int, counts: Mapping[str, Tensor]) -> TableSpec:
    rows, width = candidate.weight.shape
    own = next((counts[path] for path in candidate.paths if path in counts), None)
    dtype = dtype_name(candidate.weight.dtype)
    return TableSpec(rows, width, candidate.paths[0], seed, dtype, own)


def _build(
    candidate: _Candidate, table: TableSpec, plan: LookupPlan, keep_weights: bool
) -> dict[nn.Module, nn.Module]:
    """New modules for the tables of a candidate; tied ones share their stores."""
    assert candidate.method is not None
    first: CompressedTable | None = None
    built: dict[nn.Module, nn.Module] = {}
    for module in candidate.modules:
        new = _like(module, plan, candidate.method, "meta" if first else candidate.weight.device)
        if first is None:
            new.reset_parameters(_start_deviation(candidate.weight))
            candidate.method.fill(table, plan, new.stores())
            if keep_weights:
                new.load_stores(candidate.method.fit(table, plan, candidate.weight.detach()))
            first = new
        else:
            for name, tensor in first.stores().items():
                setattr(new, name, tensor)
        new.train(module.training)
        built[module] = new
    return built


def _like(
    module: nn.Module, plan: LookupPlan, method: Method, device: torch.device | str
) -> CompressedTable:
    """A compressed module with the torch arguments of ``module``."""
    assert isinstance(module, _TABLES)
    padding_idx, sparse = module.padding_idx, module.sparse
    if isinstance(module, (nn.EmbeddingBag, EmbeddingBag)):
        pooled = plan.with_pool(cast(Pool, module.mode), padding_idx)
        last = module.include_last_offset
        return EmbeddingBag.from_plan(
            pooled, method, sparse=sparse, include_last_offset=last, device=device
        )
    return Embedding.from_plan(
        plan.with_pool("none", padding_idx), method, sparse=sparse, device=device
    )


def _start_deviation(weight: Tensor) -> float:
    if weight.device.type == "meta":
        return 1.0
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 1_000_000)].double()
    std = float(sample.std(correction=0))
    return std if 0 < std < float("inf") else _FALLBACK_STD


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever in the model these are."""
    for parent in list(model.modules()):
        # Not named_children(): it names a module once, however many names lead to it.
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def _left_alone(candidate: _Candidate) -> TableChange:
    rows, width = candidate.weight.shape
    size = candidate.weight.untyped_storage().nbytes()
    name, *also = candidate.paths
    full = candidate.method is not None and candidate.method.name == "full"
    note = candidate.refusal or ("" if full else "small: better left full")
    return TableChange(name, rows, width, "full", size, size, note, tuple(also))


def _changed(
    candidate: _Candidate, plan: LookupPlan, shared: set[str], error: float | None
) -> TableChange:
    """What became of a table; ``shared`` are the stores that were counted, and grows."""
    assert candidate.method is not None
    rows, width = candidate.weight.shape
    name, *also = candidate.paths
    after = sum(store.bytes for store in plan.stores if store.shared not in shared)
    shared.update(store.shared for store in plan.stores if store.shared)
    return TableChange(
        name, rows, width, candidate.method.name, candidate.weight.untyped_storage().nbytes(),
        after, "tied tables stay tied" if len(candidate.modules) > 1 else "", tuple(also), error,
    )  # fmt: skip


def _check_fits(plans: Iterable[LookupPlan]) -> None:
    names = [store.shared for plan in plans for store in plan.stores if store.shared]
    if len(set(names)) < len(names):
        raise ValueError(
            "keep_weights fits one table at a time, and these share a store; choose another "
            "method, or keep_weights=False"
        )


def _fit_error(candidate: _Candidate, table: TableSpec, new: nn.Module) -> float:
    assert isinstance(new, CompressedTable)
    return relative_error(candidate.weight.detach(), new.vectors, table.counts)
