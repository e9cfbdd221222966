"""Mixed dimensions: wide rows for the ids that are asked for often, narrow rows for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.approximation.fitting import principal_directions
from embcompress.layouts.packing import pack_codes
from embcompress.methods import register
from embcompress.methods.base import JointMethod, TableSpec
from embcompress.methods.full import Full
from embcompress.plan import Code, Digit, Hash, Linear, LookupPlan, Probe, Store

#: Steps of the dial for each column of the widest block, and below one column.
_STEPS = 16
_SHARING_STEPS = 256


@register
@dataclass(frozen=True)
class MixedDim(JointMethod):
    """Mixed dimensions, P_b·E_b[x]: blocks of ids have rows of different widths, and a projection.

    Block b of n_b ids, of which an example asks for k_b, has width d_b = λ·(n_b / k_b)^−α, rounded,
    from 1 to d; λ follows from the budget. With ``blocks = 1`` a block is a whole table, and small
    tables get the wide rows. With more blocks and known counts, a table's ids are divided by
    frequency so that each block gets an equal share of the queries; one packed code an id says
    where its row is. Bags are pooled before the projection, and there is one for all blocks of a
    table: the narrow vectors stand side by side, and W = [P_1 | P_2 | …].

    Where even one column an id is too much, the ids of an undivided table share rows of one column
    by a hash; the paper stops there.

    Memory: Σ n_b·d_b + d·Σ d_b numbers; with several blocks also n·⌈log₂(n + 1)⌉ bits. A table
    of one block as wide as d has no projection.

    Source: Ginart et al., "Mixed dimension embeddings with application to memory-efficient
    recommendation systems", 2019, sections 3 and 4 (blocks), 5 (the power rule).

    Attributes:
        alpha: the rule's exponent, in [0, 1]; 0 gives every block the same width.
        blocks: blocks that a table with known counts is divided into.
        powers_of_two: round widths down to a power of two.
    """

    name: ClassVar[str] = "mixed_dim"
    alpha: float = 0.3
    blocks: int = 1
    powers_of_two: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise ValueError(f"blocks must be an integer of at least 1, got {self.blocks}")

    # -- the rule

    def _block_ends(self, table: TableSpec) -> list[int]:
        """Ends of the blocks in the order of falling counts."""
        if self.blocks == 1 or table.counts is None or not bool(table.counts.any()):
            return [table.num_embeddings]
        mass = table.counts.double().sort(descending=True).values.cumsum(0)
        shares = torch.arange(1, self.blocks, dtype=torch.float64) / self.blocks
        ends = (torch.searchsorted(mass, shares * mass[-1]) + 1).tolist()
        return sorted({*ends, table.num_embeddings})

    def _loads(self, table: TableSpec) -> list[float]:
        """n_b / k_b of each block."""
        ends = self._block_ends(table)
        sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        return [size * len(sizes) / table.queries for size in sizes]

    def _widths(self, loads: Sequence[float], smallest: float, size: int, limit: int) -> list[int]:
        widths = []
        for load in loads:
            width = round(size / _STEPS * (load / smallest) ** -self.alpha)
            width = min(max(1, width), limit)
            widths.append(1 << (width.bit_length() - 1) if self.powers_of_two else width)
        return widths

    def group_sizes(self, tables: Sequence[TableSpec]) -> range:
        """From the steps of sharing, where there are some, to those of the widest block."""
        loads = [load for table in tables for load in self._loads(table)]
        widest = max(table.embedding_dim for table in tables)
        last = _STEPS * widest * (max(loads) / min(loads)) ** self.alpha
        first = 1 if self.blocks == 1 else _SHARING_STEPS
        return range(first, _SHARING_STEPS + max(0, int(last)) + 1)

    def group_plans(self, tables: Sequence[TableSpec], size: int) -> list[LookupPlan]:
        if size < _SHARING_STEPS:
            return [self._shared_plan(table, size / _SHARING_STEPS) for table in tables]
        size += _STEPS - _SHARING_STEPS
        loads = [self._loads(table) for table in tables]
        smallest = min(load for each in loads for load in each)
        return [
            self._plan(table, self._widths(each, smallest, size, table.embedding_dim))
            for table, each in zip(tables, loads, strict=True)
        ]

    # -- the plan

    def _shared_plan(self, table: TableSpec, share: float) -> LookupPlan:
        """One column, and rows for a share of the ids."""
        plan = self._plan(table, [1])
        rows = max(1, int(share * table.num_embeddings))
        if plan.is_dense or rows == table.num_embeddings:
            return plan
        weight, projection = plan.stores
        return replace(
            plan,
            stores=(replace(weight, rows=rows), projection),
            probes=(Probe(weight.name, Hash(table.key(0), rows)),),
        )

    def _plan(self, table: TableSpec, widths: list[int]) -> LookupPlan:
        n, d = table.num_embeddings, table.embedding_dim
        if widths == [d]:
            return Full().plan(table, n)
        projection = Store("projection", d, sum(widths), table.dtype)
        if len(widths) == 1:
            stores = [Store("weight", n, widths[0], table.dtype), projection]
            probes = [Probe("weight", Digit(1, n))]
        else:
            stores = [projection, Store("codes", n, 1, f"uint{n.bit_length()}")]
            probes, begin = [], 0
            for block, (end, width) in enumerate(zip(self._block_ends(table), widths, strict=True)):
                name, rows = f"weight_{block}", end - begin
                stores.append(Store(name, rows, width, table.dtype))
                probes.append(Probe(name, Code("codes", rows, Digit(1, n), first=begin)))
                begin = end
        return LookupPlan(
            n, d, tuple(stores), tuple(probes), combine="concat", head=Linear("projection")
        )

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        if "codes" not in stores:
            return
        assert table.counts is not None
        order = table.counts.sort(descending=True, stable=True).indices
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        stores["codes"].copy_(pack_codes(rank, plan.store("codes").bits))

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """The best approximation of every block by itself, by its singular vectors.

        Rows that ids share are fitted by least squares.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        if plan.head is None:
            return {plan.stores[0].name: weight.detach()}
        if isinstance(plan.probes[0].address, Hash):
            return super().fit(table, plan, weight)
        stores: dict[str, Tensor] = {}
        order = torch.arange(table.num_embeddings)
        if len(plan.probes) > 1:
            assert table.counts is not None
            stores["codes"] = torch.zeros(plan.store("codes").bytes, dtype=torch.uint8)
            self.fill(table, plan, stores)
            order = table.counts.cpu().sort(descending=True, stable=True).indices
        directions, begin = [], 0
        for probe in plan.probes:
            store = plan.store(probe.store)
            ids = order[begin : begin + store.rows]
            counts = None if table.counts is None else table.counts.cpu()[ids]
            rows = weight.detach()[ids.to(weight.device)]
            directions.append(principal_directions(rows, store.width, counts))
            stores[store.name] = rows @ directions[-1]
            begin += store.rows
        return {**stores, "projection": torch.cat(directions, dim=1)}
