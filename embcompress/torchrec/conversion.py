"""``lower`` and ``lift``: from this library's engine to TorchRec's tables, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from embcompress.budget import format_bytes
from embcompress.memory import storage_key
from embcompress.modules import CompressedTable, Embedding, EmbeddingBag, tie_shared_stores
from embcompress.surgery import swap_modules
from embcompress.text_table import text_table
from embcompress.torchrec.collections import (
    COMPRESSED,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    configs_of,
    logical_tables,
    modules_of,
)
from embcompress.torchrec.lowered import (
    LOWERED,
    LoweredEmbeddingBagCollection,
    LoweredEmbeddingCollection,
)
from embcompress.torchrec.lowering import (
    LogicalTable,
    Lowering,
    code_stores,
    lower_plans,
    replicated_stores,
    why_not,
)

_SAMPLE = 4096


@dataclass(frozen=True)
class LoweredTable:
    """What became of one table.

    Attributes:
        name: path of its collection, and its name there.
        lookup: ``"pooled"``, ``"unpooled"`` or ``"data-parallel"`` (not lowered).
        physical: TorchRec's tables that it reads.
        sharded: bytes of these; a table that several read counts for the first.
        replicated: bytes of what every process holds: heads, codes, shared scales, or all of a
            table that was not lowered.
        note: why it was not lowered.
    """

    name: str
    lookup: str
    physical: tuple[str, ...]
    sharded: int
    replicated: int
    note: str = ""


@dataclass(frozen=True)
class LoweringReport:
    """What :func:`lower` did; prints as a table."""

    tables: tuple[LoweredTable, ...] = field(default_factory=tuple)

    def __str__(self) -> str:
        header = ("table", "lookup", "TorchRec's tables", "can be sharded", "replicated", "note")
        rows = [
            (
                table.name,
                table.lookup,
                ", ".join(table.physical),
                format_bytes(table.sharded),
                format_bytes(table.replicated),
                table.note,
            )
            for table in self.tables
        ]
        return text_table(header, rows)


def lower(model: nn.Module) -> LoweringReport:
    """Turn the compressed collections of a model into plain tables of TorchRec's, in place.

    Ids become rows before TorchRec's lookup and rows become vectors behind it, so that
    ``DistributedModelParallel``, its planner and its sharders see ordinary
    ``EmbeddingBagCollection`` and ``EmbeddingCollection`` modules. Heads, tables of codes and
    scales that all rows share stay with the model, and are replicated. A table that cannot be
    lowered runs data-parallel by this library's engine, and the report says why.

    The model goes on to hold the same parameters, but for tables whose width is no multiple of 4:
    these are padded. Create optimizers after this call. Quantized tables must be in training: their
    latents are lowered.

    Args:
        model: with collections that :func:`embcompress.compress` made.

    Raises:
        ValueError: there is none, the model is one itself, its tables have a fused optimizer, or
            codes are on the meta device, where they have no values.
    """
    found = {path: each for path, each in model.named_modules() if isinstance(each, COMPRESSED)}
    if not found:
        raise ValueError("the model has no compressed collection of TorchRec's; compress it first")
    if "" in found:
        raise ValueError("the model is itself a collection; put it into a module")
    _check(found)
    owners = _owners(found)
    report: list[LoweredTable] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for path, collection in found.items():
        tables = logical_tables(collection)
        modules = modules_of(collection)
        reasons = {t.name: _reason(t, modules[t.name], collection, owners) for t in tables}
        chosen = [table for table in tables if not reasons[table.name]]
        weighted = isinstance(collection, CompressedEmbeddingBagCollection) and (
            collection.is_weighted()
        )
        lowering = lower_plans(chosen, weighted)
        report += _describe(path, tables, lowering, reasons)
        if chosen:
            replacements[collection] = _lowered(collection, lowering)
    swap_modules(model, replacements)
    return LoweringReport(tuple(report))


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


def _lowered(collection: nn.Module, lowering: Lowering) -> nn.Module:
    deviations = {
        config.name: _deviation(modules_of(collection)[config.name], config)
        for config in configs_of(collection)
    }
    new: nn.Module
    if isinstance(collection, CompressedEmbeddingBagCollection):
        new = LoweredEmbeddingBagCollection(collection, lowering, deviations)
    else:
        assert isinstance(collection, CompressedEmbeddingCollection)
        new = LoweredEmbeddingCollection(collection, lowering, deviations)
    return new.train(collection.training)


def _deviation(table: CompressedTable, config: BaseEmbeddingConfig) -> float:
    """Standard deviation of the table's vectors; on the meta device, that of TorchRec's config."""
    device = next(iter(table.stores().values())).device
    if device.type == "meta":
        width = config.get_weight_init_max() - config.get_weight_init_min()
        return float(width) / 12**0.5
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


def _check(found: Mapping[str, nn.Module]) -> None:
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


def _owners(found: Mapping[str, nn.Module]) -> dict[tuple[str, int], set[nn.Module]]:
    """The collections that hold each storage."""
    owners: dict[tuple[str, int], set[nn.Module]] = {}
    for collection in found.values():
        for tensor in collection.parameters():
            owners.setdefault(storage_key(tensor), set()).add(collection)
    return owners


def _reason(
    table: LogicalTable,
    module: CompressedTable,
    collection: nn.Module,
    owners: Mapping[tuple[str, int], set[nn.Module]],
) -> str:
    """Why a table is not lowered; empty if it is."""
    stores = module.stores()
    floats = [tensor for tensor in stores.values() if tensor.is_floating_point()]
    if any(owners[storage_key(tensor)] != {collection} for tensor in floats):
        return "another collection shares its rows"
    packed = [
        store.name
        for store in table.plan.stores
        if store.quantization is not None and not stores[store.name].is_floating_point()
    ]
    if packed:
        return "its rows are packed; TorchRec trains float rows"
    return why_not(table.plan)


def _describe(
    path: str, tables: list[LogicalTable], lowering: Lowering, reasons: Mapping[str, str]
) -> list[LoweredTable]:
    rows = []
    for table in tables:
        name = f"{path}: {table.name}"
        if reasons[table.name]:
            size = table.plan.bytes
            rows.append(LoweredTable(name, "data-parallel", (), 0, size, reasons[table.name]))
            continue
        own = [p for p in lowering.physical if any(n == table.name for n, _ in p.sources)]
        rows.append(
            LoweredTable(
                name,
                "pooled" if table.name in lowering.pooled else "unpooled",
                tuple(physical.name for physical in own),
                sum(physical.bytes for physical in own if physical.sources[0][0] == table.name),
                sum(store.bytes for store in replicated_stores(table.plan)),
            )
        )
    return rows
