"""The planner's method: width, bits and sharing of every table, chosen together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.calibration import calibrate
from embcompress.engine.reference import address_rows
from embcompress.fitting import principal_directions
from embcompress.latents import pack_latents
from embcompress.methods import register
from embcompress.methods.base import JointMethod, TableSpec
from embcompress.methods.low_bit import LowBit
from embcompress.plan import (
    Digit,
    Hash,
    Linear,
    LookupPlan,
    Probe,
    Quantization,
    Store,
)
from embcompress.planner.explanation import Explanation
from embcompress.planner.frontier import Frontier, Option, frontier
from embcompress.planner.loss import FLOAT, table_value

_CHUNK = 1 << 18  # ids


@register
@dataclass(frozen=True)
class Auto(JointMethod):
    """The planner's choice: w columns in b bits for every id or for shared rows, P·Q(E[x]).

    All tables have rows of w ≤ d columns. Each has as many bits (1, 2, 4, 8, or floats), as many
    rows (one an id, or fewer, shared by a hash), and a projection of its own or one that tables
    share, as its ids are worth, by the closed forms of
    :mod:`embcompress.planner.loss`: how often each occurs (known counts; else a power law), what
    few columns and bits lose, what sharing loses. Of all ways to spend the budget it takes the
    one with the least expected loss. Where w = d there is no projection.

    Memory: Σ ⌈R·w·b/8⌉ bytes for R rows a table, 4·w for the steps of each, 4·d·w for the
    projections.

    Source: ours; see docs/planner.md.

    Attributes:
        share_projection: whether tables may share a projection.
    """

    name: ClassVar[str] = "auto"
    share_projection: bool = True

    def _frontier(self, tables: Sequence[TableSpec]) -> Frontier:
        values = tuple(table_value(table) for table in tables)
        dims = tuple(table.embedding_dim for table in tables)
        # A single table has nothing to share.
        return frontier(values, dims, self.share_projection and len(tables) > 1)

    def group_sizes(self, tables: Sequence[TableSpec]) -> range:
        return range(len(self._frontier(tables)))

    def group_plans(self, tables: Sequence[TableSpec], size: int) -> list[LookupPlan]:
        options = self._frontier(tables).options(size)
        return [_plan(*each) for each in zip(tables, options, strict=True)]

    def for_trained_tables(self) -> JointMethod:
        return replace(self, share_projection=False)

    def explain(self, tables: Sequence[TableSpec], plans: Sequence[LookupPlan]) -> Explanation:
        return Explanation.of(self._frontier(tables), tables, plans)

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Quantized leading columns, as of :class:`~embcompress.LowBit`.

        Rows that ids share approximate the mean of these, weighed by counts.
        """
        rows, counts = _row_means(table, plan, weight.detach())
        merged = replace(table, num_embeddings=len(rows), counts=counts)
        store = plan.store("weight")
        if plan.head is None:
            if store.is_float:
                return {"weight": rows}
            scale, _ = calibrate(rows, store.bits, "column", importance=counts, symmetric=True)
            stores = {"scale": scale, "weight": rows}
            return {**stores, "weight": pack_latents(plan, store, stores)}
        if store.is_float:
            directions = principal_directions(rows, store.width, counts)
            return {"weight": rows @ directions, "projection": directions}
        return LowBit().fit(merged, plan, rows)


def _plan(table: TableSpec, option: Option) -> LookupPlan:
    n, d, width, rows = table.num_embeddings, table.embedding_dim, option.width, option.rows
    if option.bits == FLOAT:
        stores = [Store("weight", rows, width, table.dtype)]
    else:
        quantization = Quantization("scale")
        stores = [
            Store("scale", 1, width, table.dtype),
            Store("weight", rows, width, f"uint{option.bits}", quantization),
        ]
    head = None
    if width < d:
        name = f"auto_{d}x{width}" if option.shares else ""
        stores.append(Store("projection", d, width, table.dtype, shared=name))
        head = Linear("projection")
    address = Digit(1, n) if rows == n else Hash(table.key(0), rows)
    return LookupPlan(n, d, tuple(stores), (Probe("weight", address),), head=head)


def _row_means(table: TableSpec, plan: LookupPlan, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mean of the ids of every row, and how often these occur together."""
    if plan.store("weight").rows == table.num_embeddings:
        return weight, table.counts
    ids = torch.arange(table.num_embeddings)
    address = plan.probes[0].address
    rows = torch.cat([address_rows(address, part, plan, {})[0] for part in ids.split(_CHUNK)])
    counts = torch.ones(len(ids)) if table.counts is None else table.counts.float().cpu() + 1e-3
    totals = torch.zeros(plan.store("weight").rows).index_add_(0, rows, counts)
    means = weight.new_zeros(len(totals), weight.shape[1])
    means.index_add_(0, rows.to(weight.device), weight * counts[:, None].to(weight))
    return means / totals.clamp(min=1e-12)[:, None].to(weight), totals
