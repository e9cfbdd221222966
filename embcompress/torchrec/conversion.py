"""``lower`` and ``lift``: from this library's engine to TorchRec's tables, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from embcompress.budget import format_bytes
from embcompress.lowering.tables import (
    Lowering,
    PhysicalTable,
    code_stores,
    lower_plans,
    replicated_stores,
    why_not,
)
from embcompress.memory import storage_key
from embcompress.modules import Embedding, EmbeddingBag
from embcompress.surgery.table_building import swap_modules
from embcompress.tables.compressed_table import CompressedTable, tie_shared_stores
from embcompress.text_table import text_table
from embcompress.torchrec.collections import (
    COMPRESSED,
    Compressed,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    logical_tables,
    modules_of,
)
from embcompress.torchrec.lowered import (
    LOWERED,
    LoweredEmbeddingBagCollection,
    LoweredEmbeddingCollection,
)
from embcompress.torchrec.traffic import Batch, TrafficReport, physical_traffic, traffic

_SAMPLE = 4096


@dataclass(frozen=True)
class LoweredTable:
    """What became of one table.

    Attributes:
        name: path of its collection, and its name there.
        lookup: ``"pooled"`` or ``"unpooled"`` by TorchRec, or ``"engine"``: by this library's,
            data-parallel.
        sharded: TorchRec's tables that it reads, which can be sharded.
        replicated: bytes of what every process holds: heads, codes, shared scales and small
            tables.
        note: why the engine runs it.
    """

    name: str
    lookup: str
    sharded: tuple[PhysicalTable, ...]
    replicated: int
    note: str = ""


@dataclass(frozen=True)
class LoweringReport:
    """What :func:`lower` did, and what that means for communication; prints as a table.

    Attributes:
        tables: the tables of the model.
        traffic: bytes that a process sends in a step, before and after.
    """

    tables: tuple[LoweredTable, ...]
    traffic: TrafficReport

    def __str__(self) -> str:
        header = ("table", "lookup", "TorchRec's tables", "their bytes", "replicated", "note")
        rows = [
            (
                table.name,
                table.lookup,
                ", ".join(each.name for each in table.sharded),
                format_bytes(sum(each.bytes for each in table.sharded)),
                format_bytes(table.replicated),
                table.note,
            )
            for table in self.tables
        ]
        return f"{text_table(header, rows)}\n\n{self.traffic}"


def lower(
    model: nn.Module, batch: Batch, *, data_parallel_bytes: int | None = None
) -> LoweringReport:
    """Turn the compressed collections of a model into plain tables of TorchRec's, in place.

    Ids become rows before TorchRec's lookup and rows become vectors behind it, so that
    ``DistributedModelParallel``, its planner and its sharders see ordinary
    ``EmbeddingBagCollection`` and ``EmbeddingCollection`` modules. Heads, tables of codes and
    scales that all rows share stay with the model and are replicated, and so do small tables: those
    of which sending the whole gradient takes fewer bytes than exchanging ids and vectors
    (:func:`embcompress.torchrec.traffic`). A table of which nothing remains to be sharded, or which
    cannot be lowered, is run by this library's engine, data-parallel.

    The model goes on to hold the same parameters, but for TorchRec's tables whose width is no
    multiple of 4: these are padded. Create optimizers after this call. Quantized tables must be in
    training: their latents are lowered.

    Args:
        model: with collections that :func:`embcompress.compress` made.
        batch: what a process will look up, which decides what is small.
        data_parallel_bytes: tables of up to so many bytes are small, and no others, whatever is
            sent; 0 gives everything to TorchRec.

    Raises:
        ValueError: there is no such collection, the model is one itself, its tables have a fused
            optimizer, or codes are on the meta device, where they have no values.
    """
    found = {path: each for path, each in model.named_modules() if isinstance(each, COMPRESSED)}
    if not found:
        raise ValueError("the model has no compressed collection of TorchRec's; compress it first")
    if "" in found:
        raise ValueError("the model is itself a collection; put it into a module")
    _check(found)
    owners = _owners(found)

    def is_small(table: PhysicalTable) -> bool:
        if data_parallel_bytes is not None:
            return table.bytes <= data_parallel_bytes
        return physical_traffic(batch, table).placement == "data-parallel"

    report: list[LoweredTable] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for path, collection in found.items():
        reasons = _reasons(collection, owners)
        lowering = _lower_large(collection, reasons, is_small)
        _check_engine_tables(path, collection, reasons)
        report += _describe(path, collection, lowering, reasons)
        if lowering.tables:
            replacements[collection] = _lowered(collection, lowering)
    swap_modules(model, replacements)
    return LoweringReport(tuple(report), traffic(model, batch))


def _lower_large(
    collection: Compressed, reasons: dict[str, str], is_small: Callable[[PhysicalTable], bool]
) -> Lowering:
    """Lower the tables without a reason not to, and add the reason of those that are all small."""
    weighted = isinstance(collection, CompressedEmbeddingBagCollection) and collection.is_weighted()
    tables = [table for table in logical_tables(collection) if not reasons[table.name]]
    physical = lower_plans(tables, weighted).physical
    small = {table.name for table in physical if is_small(table)}
    large = {name for table in physical if table.name not in small for name, _ in table.sources}
    for table in tables:
        if table.name not in large:
            reasons[table.name] = "small"
    return lower_plans([table for table in tables if table.name in large], weighted, small)


def lift(model: nn.Module) -> None:
    """Undo :func:`lower`, in place: the engine runs the tables again, with their present values.

    For a model that is not sharded: load the checkpoint of a sharded one into a lowered model of
    one process first.

    Raises:
        ValueError: there is nothing to undo, or tables are sharded.
    """
    found = {path: each for path, each in model.named_modules() if isinstance(each, LOWERED)}
    if not found or "" in found:
        raise ValueError("the model has no lowered collection, or is itself one")
    swap_modules(model, {each: _lifted(each) for each in found.values()})


# ----------------------------------------------------------------------------------- collections


def _lowered(collection: Compressed, lowering: Lowering) -> nn.Module:
    deviations = {name: _deviation(table) for name, table in modules_of(collection).items()}
    new: nn.Module
    if isinstance(collection, CompressedEmbeddingBagCollection):
        new = LoweredEmbeddingBagCollection(collection, lowering, deviations)
    else:
        assert isinstance(collection, CompressedEmbeddingCollection)
        new = LoweredEmbeddingCollection(collection, lowering, deviations)
    return new.train(collection.training)


def _deviation(table: CompressedTable) -> float:
    """Standard deviation of the table's vectors, or on the meta device of those it would draw."""
    device = next(iter(table.stores().values())).device
    if device.type == "meta":
        return table.start_deviation
    count = min(_SAMPLE, table.num_embeddings)
    ids = torch.arange(count, device=device) * (table.num_embeddings // count)
    std = float(table.vectors(ids).double().std(correction=0))
    return std if std > 0 else 1.0


def _lifted(collection: nn.Module) -> nn.Module:
    assert isinstance(collection, LOWERED)
    tables: dict[str, Any] = {}
    for table in collection.lowered.lowering.tables:
        kind = Embedding if table.plan.pool == "none" else EmbeddingBag
        more = {} if table.plan.pool == "none" else {"include_last_offset": True}
        module = kind.from_plan(table.plan, table.method, device="meta", **more)  # type: ignore[arg-type]
        for name, tensor in collection.lowered.stores(table.name).items():
            module.hold(name, tensor)
        tables[table.name] = module
    tie_shared_stores(tables.values())
    if collection.local is not None:
        tables.update(modules_of(collection.local))
    new: nn.Module
    if isinstance(collection, LoweredEmbeddingBagCollection):
        weighted = collection.is_weighted()
        new = CompressedEmbeddingBagCollection(collection.embedding_bag_configs(), tables, weighted)
    else:
        assert isinstance(collection, LoweredEmbeddingCollection)
        new = CompressedEmbeddingCollection(
            collection.embedding_configs(), tables, collection.need_indices()
        )
    return new.train(collection.training)


# ---------------------------------------------------------------------------------------- reasons


def _check(found: Mapping[str, Compressed]) -> None:
    for path, collection in found.items():
        for name, table in modules_of(collection).items():
            if table.fused_rule is not None:
                raise ValueError(
                    f"table {name!r} of {path} has a fused optimizer of embcompress; lower the "
                    "model first, and give TorchRec its own"
                )
            codes = [table.stores()[store.name] for store in code_stores(table.plan)]
            if any(tensor.device.type == "meta" for tensor in codes):
                raise ValueError(
                    f"table {name!r} of {path} has codes on the meta device, where they have no "
                    "values; build the model on a real device, or choose a method without codes"
                )


def _check_engine_tables(path: str, collection: Compressed, reasons: Mapping[str, str]) -> None:
    for name, table in modules_of(collection).items():
        on_meta = next(iter(table.stores().values())).device.type == "meta"
        if reasons[name] and on_meta and any(store.shared for store in table.plan.stores):
            raise ValueError(
                f"table {name!r} of {path} shares a store on the meta device and is run by the "
                "engine; DistributedModelParallel would make one for each table. Build the model "
                "on a real device"
            )


def _owners(found: Mapping[str, Compressed]) -> dict[tuple[str, int], set[nn.Module]]:
    """The collections that hold each storage."""
    owners: dict[tuple[str, int], set[nn.Module]] = {}
    for collection in found.values():
        for tensor in collection.parameters():
            owners.setdefault(storage_key(tensor), set()).add(collection)
    return owners


def _reasons(
    collection: Compressed, owners: Mapping[tuple[str, int], set[nn.Module]]
) -> dict[str, str]:
    """Why each table cannot be lowered; empty if it can."""
    modules = modules_of(collection)
    reasons = {}
    for table in logical_tables(collection):
        stores = modules[table.name].stores()
        floats = {name: tensor for name, tensor in stores.items() if tensor.is_floating_point()}
        quantized = {s.name for s in table.plan.stores if s.quantization is not None}
        if any(owners[storage_key(tensor)] != {collection} for tensor in floats.values()):
            reasons[table.name] = "another collection shares its rows"
        elif not quantized <= set(floats):
            reasons[table.name] = "its rows are packed, and TorchRec trains float rows"
        else:
            reasons[table.name] = why_not(table.plan)
    return reasons


def _describe(
    path: str, collection: Compressed, lowering: Lowering, reasons: Mapping[str, str]
) -> list[LoweredTable]:
    rows = []
    for table in logical_tables(collection):
        name = f"{path}: {table.name}"
        if reasons[table.name]:
            rows.append(LoweredTable(name, "engine", (), table.plan.bytes, reasons[table.name]))
            continue
        own = [p for p in lowering.physical if any(n == table.name for n, _ in p.sources)]
        sharded = tuple(each for each in own if not each.is_small)
        replicated = sum(store.bytes for store in replicated_stores(table.plan))
        replicated += sum(each.bytes for each in own if each.is_small)
        lookup = "pooled" if table.name in lowering.pooled else "unpooled"
        rows.append(LoweredTable(name, lookup, sharded, replicated))
    return rows
