"""Rows of their own for hot ids, which are found in slots, and hashed rows for the others."""

from __future__ import annotations

from dataclasses import dataclass

from embcompress.layouts.slots import WEIGHT, SlotLayout, check_split
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Hash, LookupPlan, Probe, Store


@dataclass(frozen=True)
class HotRows(Method):
    """The plan of :class:`~embcompress.Adaptive` and :class:`~embcompress.Cafe`.

    Attributes:
        hot: share of the rows that ids own, in (0, 1).
        ways: slots of a bucket, ≥ 1. An id whose bucket is full shares a row.
    """

    hot: float = 0.5
    ways: int = 8

    def __post_init__(self) -> None:
        check_split(self.hot, self.ways)

    def sizes(self, table: TableSpec) -> range:
        """Numbers of rows."""
        return range(2, max(2, table.num_embeddings) + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        layout = SlotLayout.of_size(table, size, self.hot, self.ways)
        cold = Hash(table.key(0), layout.shared)
        return LookupPlan(
            table.num_embeddings,
            table.embedding_dim,
            stores=(
                Store(WEIGHT, layout.rows, table.embedding_dim, table.dtype),
                layout.key_store(),
            ),
            probes=(Probe(WEIGHT, layout.address(cold)),),
        )
