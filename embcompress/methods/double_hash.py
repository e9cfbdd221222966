"""Two hashed rows for every id; frequent ids own one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from embcompress.layouts.slots import KEYS, SlotLayout, check_split, static_keys
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Hash, LookupPlan, Probe, Store


@register
@dataclass(frozen=True)
class DoubleHash(Method):
    """Double hashing, E₀[h₀(x)] ∘ E₁[h₁(x)]: two hashes tell ids apart; frequent ids own rows.

    Two ids have the same vector only where both hashes agree. With counts of the ids, frequent ones
    are not hashed ("frequency hashing"): a share ``hot`` of the rows is theirs alone, found in a
    hash table of their keys with ``ways`` slots a bucket.

    Memory: m·d numbers for m rows; with counts also ⌈log2(n + 1)⌉ bits for every row that is owned
    (at most 32). ``"sum"`` has one table of m rows that both hashes read, ``"concat"`` two of m
    rows and half the columns.

    Source: Zhang et al., "Model size reduction using frequency based double hashing for recommender
    systems", RecSys 2020. What differs: keyed hashes; keys in slots, not an index of the frequent
    ids.

    Attributes:
        combine: ``"sum"`` or ``"concat"``.
        hot: with counts, the share of the rows that ids own, in (0, 1).
        ways: slots of a bucket, ≥ 1.
    """

    name: ClassVar[str] = "double_hash"
    combine: Literal["sum", "concat"] = "sum"
    hot: float = 0.5
    ways: int = 8

    def __post_init__(self) -> None:
        if self.combine not in ("sum", "concat"):
            raise ValueError(f"combine must be 'sum' or 'concat', got {self.combine!r}")
        check_split(self.hot, self.ways)

    def sizes(self, table: TableSpec) -> range:
        """Numbers of rows."""
        first = 1 if table.counts is None else 2
        return range(first, max(first, table.num_embeddings) + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        widths = self._widths(table.embedding_dim)
        names = [f"weight_{t}" for t in range(len(widths))]
        stores = [
            Store(name, size, width, table.dtype) for name, width in zip(names, widths, strict=True)
        ]
        if table.counts is None:
            addresses: list[Hash] = [Hash(table.key(t), size) for t in range(2)]
            probes = [Probe(names[t % len(names)], address) for t, address in enumerate(addresses)]
        else:
            layout = SlotLayout.of_size(table, size, self.hot, self.ways)
            stores.append(layout.key_store())
            cold = [Hash(table.key(t), layout.shared) for t in range(2)]
            # Of a sum an owned row is all there is: the second probe adds nothing to it.
            second = layout.shared if self.combine == "sum" else layout.rows
            probes = [
                Probe(names[0], layout.address(cold[0])),
                Probe(names[-1], layout.address(cold[1], second)),
            ]
        return LookupPlan(
            table.num_embeddings,
            table.embedding_dim,
            stores=tuple(stores),
            probes=tuple(probes),
            combine=self.combine,
        )

    def _widths(self, embedding_dim: int) -> tuple[int, ...]:
        if self.combine == "sum":
            return (embedding_dim,)
        if embedding_dim < 2:
            raise ValueError(
                "double_hash with combine='concat' needs embedding_dim >= 2, got "
                f"{embedding_dim}; use combine='sum'"
            )
        return embedding_dim - embedding_dim // 2, embedding_dim // 2

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        if KEYS in stores and stores[KEYS].device.type != "meta":
            stores[KEYS].copy_(static_keys(table, SlotLayout.of(plan), plan.padding_idx))
