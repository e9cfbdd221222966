"""Smaller tables out of trained ones, without training: the first columns, or the first probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from embcompress.modules import Embedding, EmbeddingBag
from embcompress.plan import Digit, Linear, LookupPlan, Probe, Store
from embcompress.tables.compressed_table import CompressedTable

TableType = TypeVar("TableType", bound=CompressedTable)


def cut_columns(table: TableType, width: int) -> TableType:
    """See :meth:`embcompress.Matryoshka.cut`."""
    plan, stores = table.plan, table.stores()
    rows = plan.probes[0].store
    heads = {plan.head.weight} if isinstance(plan.head, Linear) else set()
    if {store.name for store in plan.stores} != {rows} | heads or not plan.store(rows).is_float:
        raise ValueError(
            f"cut takes a table of floats with a row for every id and a projection at most; this "
            f"one is {plan}"
        )
    weight = stores[rows].detach()
    if not 1 <= width <= weight.shape[1]:
        raise ValueError(f"width must be in [1, {weight.shape[1]}], got {width}")
    if isinstance(plan.head, Linear):
        projection = stores[plan.head.weight].detach()
    else:
        projection = torch.eye(plan.embedding_dim, dtype=weight.dtype, device=weight.device)
    values = {"weight": weight[:, :width], "projection": projection[:, :width]}
    new = replace(
        plan,
        stores=tuple(
            Store(name, part.shape[0], part.shape[1], plan.store(rows).dtype)
            for name, part in values.items()
        ),
        probes=(Probe("weight", Digit(1, plan.num_embeddings)),),
        head=Linear("projection"),
    )
    return _holding(table, new, values)


def cut_probes(table: TableType, count: int) -> TableType:
    """See :meth:`embcompress.ResidualBinary.cut`."""
    plan = table.plan
    if plan.combine != "sum" or not (plan.head is None or isinstance(plan.head, Linear)):
        raise ValueError(f"cut takes a table whose vectors are sums, not {plan}")
    if not 1 <= count <= len(plan.probes):
        raise ValueError(f"codes must be in [1, {len(plan.probes)}], got {count}")
    probes = plan.probes[:count]
    used = {probe.store for probe in probes}
    for store in plan.stores:
        if store.name in used and store.quantization is not None:
            used |= {store.quantization.scale, store.quantization.bias or ""}
    if isinstance(plan.head, Linear):
        used.add(plan.head.weight)
    kept = tuple(store for store in plan.stores if store.name in used)
    new = replace(plan, stores=kept, probes=probes)
    values = {store.name: table.stores()[store.name].detach() for store in kept}
    return _holding(table, new, values)


def _holding(table: TableType, plan: LookupPlan, values: Mapping[str, Tensor]) -> TableType:
    """A table of the same kind with another plan and copies of these values."""
    device = next(iter(values.values())).device
    deployed = not table.latents()
    module: CompressedTable
    if isinstance(table, EmbeddingBag):
        module = EmbeddingBag.from_plan(
            plan,
            table.method,
            sparse=table.sparse,
            include_last_offset=table.include_last_offset,
            deployed=deployed,
            device=device,
        )
    else:
        module = Embedding.from_plan(
            plan, table.method, sparse=table.sparse, deployed=deployed, device=device
        )
    module.load_stores(values)
    return cast(TableType, module.train(table.training))
