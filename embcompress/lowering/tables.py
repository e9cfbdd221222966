"""Plans as lookups in plain tables: what TorchRec stores and reads, as data.

A *read* is one feature of TorchRec's: the rows that some probes of a plan address in one of its
stores. Where sums come before everything else, TorchRec pools them, so that only pooled vectors
travel between processes:

- a sum reads each store once, for a bag the rows of all its ids and probes;
- a concatenation reads every probe's store by itself, and the pooled parts are put side by side.

Products, learned weights, quantized rows and plans that do not pool need the rows of each id:
their reads are not pooled, and this library's code combines them where the ids are.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from embcompress.engine.heads import is_linear
from embcompress.methods import Method
from embcompress.plan import Code, LookupPlan, Probe, Sign, Slot, Store, Weight

#: What the rows of a read are to the plan.
Role = Literal["rows", "weight", "scale", "bias"]

#: FBGEMM's kernels take rows of a multiple of so many numbers.
COLUMN_MULTIPLE = 4
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Read:
    """What some probes of a plan read from one store.

    Attributes:
        store: name of the store in the plan.
        probes: numbers of the probes; those of a pooled read are summed.
        role: what the rows are.
    """

    store: str
    probes: tuple[int, ...]
    role: Role = "rows"


@dataclass(frozen=True)
class LogicalTable:
    """A table of a collection, as the model sees it.

    Attributes:
        name: in the collection.
        features: that read it.
        plan: how.
        method: that made the plan: an object, or a name where it is no method's.
    """

    name: str
    features: tuple[str, ...]
    plan: LookupPlan
    method: str | Method = "plan"


@dataclass(frozen=True)
class PhysicalTable:
    """A store as TorchRec's table.

    Attributes:
        name: TorchRec's name for it: that of the table and of the store, or of the shared store.
        store: what it holds.
        pooled: whether TorchRec sums its rows over bags, or hands out a row for every id.
        features: TorchRec's features that read it.
        model_features: the feature of the model that each of them stems from.
        queries: for each of them, rows that an id of the feature reads.
        sources: (table, store name) of everything that it stands for; several where shared.
        is_small: held by the model itself and replicated, rather than by TorchRec.
    """

    name: str
    store: Store
    pooled: bool
    features: tuple[str, ...]
    model_features: tuple[str, ...]
    queries: tuple[int, ...]
    sources: tuple[tuple[str, str], ...]
    is_small: bool = False

    @property
    def columns(self) -> int:
        """Width, in TorchRec's tables with padding to a multiple of :data:`COLUMN_MULTIPLE`."""
        if self.is_small:
            return self.store.width
        return -(-self.store.width // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    @property
    def bytes(self) -> int:
        """Bytes in training."""
        return self.store.rows * self.columns * (2 if self.dtype == "float16" else 4)

    @property
    def dtype(self) -> str:
        """``"float16"`` or ``"float32"``, which the latents of quantized rows are, too."""
        return self.store.dtype if self.store.is_float else "float32"


def why_not(plan: LookupPlan) -> str:
    """Why a plan cannot be lowered; empty if it can."""
    if any(s.sparsity is not None or s.threshold is not None for s in plan.stores):
        return "TorchRec has no sparse rows"
    if plan.offloaded:
        return "TorchRec has no rows in files"
    if plan.pool == "max":
        return "TorchRec does not pool by maxima"
    if any(store.stride is not None for store in plan.stores):
        return "TorchRec has no rows that overlap"
    if not is_linear(plan.head):
        return "TorchRec's vectors have no heads that are not linear"
    if any(_has_fixed_row_steps(plan, store) for store in plan.stores):
        return "TorchRec would train the steps of single rows, which its method sets"
    replicated = {store.name for store in replicated_stores(plan)}
    known = {store.name for store in code_stores(plan)}
    known |= {*plan.head_stores}
    known |= {name for store in plan.stores for name in _shared_steps(plan, store)}
    if replicated != known:
        return "a store is read in two ways, or not at all"
    for store in plan.stores:
        if store.is_float and store.name not in replicated and store.dtype not in DTYPES:
            return f"TorchRec has no tables of {store.dtype}"
    return ""


def _has_fixed_row_steps(plan: LookupPlan, store: Store) -> bool:
    """Whether every row has a step of its own that no optimizer may train."""
    names = store.quantization
    return names is not None and not names.trained and plan.store(names.scale).rows > 1


def _shared_steps(plan: LookupPlan, store: Store) -> tuple[str, ...]:
    """Scale and bias of a quantized store, where all its rows share them."""
    names = store.quantization
    if names is None or plan.store(names.scale).rows > 1:
        return ()
    return (names.scale,) if names.bias is None else (names.scale, names.bias)


def is_pooled(plan: LookupPlan) -> bool:
    """Whether every step up to the sum over the bag is one that TorchRec can take."""
    return is_summed(plan) and all(
        plan.store(probe.store).quantization is None for probe in plan.probes
    )


def is_summed(plan: LookupPlan) -> bool:
    """Whether a bag is a sum of rows, times known numbers, up to the head."""
    return (
        plan.pool in ("sum", "mean")
        and (plan.combine != "mul" or len(plan.probes) == 1)
        and not any(isinstance(probe.scale, Weight) for probe in plan.probes)
    )


def needs_weights(plan: LookupPlan) -> bool:
    """Whether pooled reads are weighted though the ids are not."""
    return any(isinstance(probe.scale, Sign) for probe in plan.probes)


def pooled_reads(plan: LookupPlan) -> tuple[Read, ...]:
    """The reads of a plan that TorchRec pools."""
    reads: dict[tuple[str, int], list[int]] = {}
    for t, (probe, (column, _)) in enumerate(zip(plan.probes, plan.columns, strict=True)):
        reads.setdefault((probe.store, column), []).append(t)
    return tuple(Read(store, tuple(probes)) for (store, _), probes in reads.items())


def unpooled_reads(plan: LookupPlan) -> tuple[Read, ...]:
    """The reads of a plan that combines the rows of each id; equal ones are one."""
    reads: dict[tuple[object, ...], list[int]] = {}
    for t, probe in enumerate(plan.probes):
        for role, store, address in _parts(plan, probe):
            reads.setdefault((role, store, address), []).append(t)
    return tuple(
        Read(str(store), tuple(probes), role)  # type: ignore[arg-type]
        for (role, store, _), probes in reads.items()
    )


def _parts(plan: LookupPlan, probe: Probe) -> list[tuple[Role, str, object]]:
    """Role, store and address of everything that a probe reads by row."""
    row = (probe.address, probe.offset)
    parts: list[tuple[Role, str, object]] = [("rows", probe.store, row)]
    if isinstance(probe.scale, Weight):
        parts.append(("weight", probe.scale.store, probe.scale.address))
    quantization = plan.store(probe.store).quantization
    if quantization is not None and plan.store(quantization.scale).rows > 1:
        parts.append(("scale", quantization.scale, row))
        if quantization.bias is not None:
            parts.append(("bias", quantization.bias, row))
    return parts


def replicated_stores(plan: LookupPlan) -> tuple[Store, ...]:
    """What every process holds itself: heads, tables of codes, and scales that rows share."""
    read = {read.store for read in unpooled_reads(plan)}
    return tuple(store for store in plan.stores if store.name not in read)


def code_stores(plan: LookupPlan) -> tuple[Store, ...]:
    """The tables of codes and slots of a plan."""
    addresses = [probe.address for probe in plan.probes]
    addresses += [p.scale.address for p in plan.probes if isinstance(p.scale, Weight)]
    addresses += [a.otherwise for a in addresses if isinstance(a, Code | Slot) and a.otherwise]
    names = {address.store for address in addresses if isinstance(address, Code | Slot)}
    return tuple(store for store in plan.stores if store.name in names)


@dataclass(frozen=True)
class Lowering:
    """The tables of a collection as TorchRec's.

    Attributes:
        tables: that were lowered.
        pooled: names of those that TorchRec pools.
        is_weighted: whether pooled reads are: the ids are weighted, or some rows have signs.
        physical: what TorchRec holds.
    """

    tables: tuple[LogicalTable, ...]
    pooled: frozenset[str]
    is_weighted: bool
    physical: tuple[PhysicalTable, ...]

    def plan(self, name: str) -> LookupPlan:
        """The plan of the table of that name."""
        return next(table.plan for table in self.tables if table.name == name)

    def reads(self, table: LogicalTable) -> tuple[Read, ...]:
        """The reads of a table, the same for each of its features."""
        pooled = table.name in self.pooled
        return pooled_reads(table.plan) if pooled else unpooled_reads(table.plan)


def feature_of(table: str, feature: str, number: int) -> str:
    """TorchRec's name of a feature's read of that number."""
    return f"{table}/{feature}/{number}"


def _physical_name(table: LogicalTable, store: Store) -> str:
    if table.plan.is_dense:
        return table.name
    return f"shared/{store.shared}" if store.shared else f"{table.name}/{store.name}"


def lower_plans(
    tables: Sequence[LogicalTable], is_weighted: bool, small: Container[str] = ()
) -> Lowering:
    """Lower the plans of a collection.

    Args:
        tables: each of which can be lowered (:func:`why_not`).
        is_weighted: whether the ids have weights.
        small: names of physical tables that the model holds itself.
    """
    pooled = _pooled_tables(tables)
    weighted = is_weighted or any(needs_weights(t.plan) for t in tables if t.name in pooled)
    lowering = Lowering(tuple(tables), pooled, weighted, ())
    entries: dict[str, list[_Entry]] = {}
    for table in tables:
        for feature in table.features:
            for number, read in enumerate(lowering.reads(table)):
                name = _physical_name(table, table.plan.store(read.store))
                entries.setdefault(name, []).append(_Entry(table, feature, read, number))
    physical = [_physical(name, own, pooled, name in small) for name, own in entries.items()]
    return replace(lowering, physical=tuple(physical))


@dataclass(frozen=True)
class _Entry:
    """A read, the table and feature that it is of, and its number among them."""

    table: LogicalTable
    feature: str
    read: Read
    number: int


def _physical(
    name: str, entries: Sequence[_Entry], pooled: frozenset[str], is_small: bool
) -> PhysicalTable:
    first = entries[0]
    is_pooled = first.table.name in pooled
    return PhysicalTable(
        name,
        first.table.plan.store(first.read.store),
        is_pooled,
        features=tuple(feature_of(e.table.name, e.feature, e.number) for e in entries),
        model_features=tuple(e.feature for e in entries),
        queries=tuple(len(e.read.probes) if is_pooled else 1 for e in entries),
        sources=tuple(dict.fromkeys((e.table.name, e.read.store) for e in entries)),
        is_small=is_small,
    )


def _pooled_tables(tables: Sequence[LogicalTable]) -> frozenset[str]:
    """The tables that TorchRec pools: tables that share a store are read in one way."""
    pooled = {table.name for table in tables if is_pooled(table.plan)}
    while True:
        other = {
            store.shared
            for table in tables
            if table.name not in pooled
            for store in table.plan.stores
            if store.shared
        }
        torn = {
            table.name
            for table in tables
            if table.name in pooled and any(s.shared in other for s in table.plan.stores)
        }
        if not torn:
            return frozenset(pooled)
        pooled -= torn
