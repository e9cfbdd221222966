"""One store for all features: unified embeddings by feature multiplexing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from embcompress.methods import register
from embcompress.methods.base import JointMethod, TableSpec
from embcompress.plan import Hash, Linear, LookupPlan, Probe, Store


@register
@dataclass(frozen=True)
class Unified(JointMethod):
    """Unified embedding, E[h₁(x)] ‖ … ‖ E[h_p(x)]: all features share the rows of one store.

    Every table reads p rows of ``chunk`` columns, each by a hash of its own, and concatenates
    them. Keys come from the tables' *names*: their order does not matter, and a table that is
    added later changes nobody's vectors (given the same number of rows).

    With ``probes="width"`` a table of width d has p = d / chunk. With ``"vocabulary"`` small
    vocabularies have fewer, p = ⌈(d / chunk)·log n / log n_max⌉, and a projection of their own to
    d, for the tables whose p·chunk is less than d.

    Memory: m·chunk numbers for all tables together, and the projections.

    Source: Coleman et al., "Unified embedding: battle-tested feature representations for web-scale
    ML systems", NeurIPS 2023, section 3. What differs: keys by name, and the projection, which
    keeps the width that the model expects.

    Attributes:
        chunk: columns of the store; it divides every table's width. None: a quarter of the
            widths' greatest common divisor, or a half or the whole where that is no integer.
        probes: ``"width"`` or ``"vocabulary"``.
        group: tables with the same group, method, seed and dtype share a store. None: each has
            one of its own, in proportion to its dense size; so trained tables are approximated.
    """

    name: ClassVar[str] = "unified"
    chunk: int | None = None
    probes: str = "width"
    group: str | None = "unified"

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.probes not in ("width", "vocabulary"):
            raise ValueError(f"probes must be 'width' or 'vocabulary', got {self.probes!r}")
        if self.group == "":
            raise ValueError("group must not be empty; None keeps the tables' stores apart")

    def columns(self, tables: Sequence[TableSpec]) -> int:
        """Columns of the store for these tables.

        Raises:
            ValueError: ``chunk`` does not divide a table's width.
        """
        divisor = math.gcd(*(table.embedding_dim for table in tables))
        if self.chunk is None:
            return next(divisor // parts for parts in (4, 2, 1) if divisor % parts == 0)
        if divisor % self.chunk:
            raise ValueError(
                f"chunk = {self.chunk} does not divide the tables' widths, whose greatest common "
                f"divisor is {divisor}"
            )
        return self.chunk

    def _probes(self, table: TableSpec, tables: Sequence[TableSpec], chunk: int) -> int:
        most = table.embedding_dim // chunk
        if self.probes == "width":
            return most
        largest = max(other.num_embeddings for other in tables)
        share = math.log1p(table.num_embeddings) / math.log1p(largest)
        return max(1, math.ceil(most * share - 1e-9))

    def group_sizes(self, tables: Sequence[TableSpec]) -> range:
        return range(1, sum(t.num_embeddings * t.embedding_dim for t in tables) + 1)

    def group_plans(self, tables: Sequence[TableSpec], size: int) -> list[LookupPlan]:
        chunk = self.columns(tables)
        numbers = [table.num_embeddings * table.embedding_dim for table in tables]
        plans = []
        for table, own in zip(tables, numbers, strict=True):
            if self.group is None:
                store = Store("weight", max(1, size * own // sum(numbers)), chunk, table.dtype)
            else:
                store = Store("weight", size, chunk, tables[0].dtype, shared=self.group)
            plans.append(self._plan(table, store, self._probes(table, tables, chunk)))
        return plans

    def of_dtype(self, dtype: str) -> JointMethod:
        return self if self.group is None else replace(self, group=f"{self.group}-{dtype}")

    def for_trained_tables(self) -> JointMethod:
        return replace(self, group=None)

    def _plan(self, table: TableSpec, store: Store, probes: int) -> LookupPlan:
        width = probes * store.width
        stores = [store]
        if width < table.embedding_dim:
            stores.append(Store("projection", table.embedding_dim, width, table.dtype))
        return LookupPlan(
            table.num_embeddings,
            table.embedding_dim,
            stores=tuple(stores),
            probes=tuple(Probe(store.name, Hash(table.key(t), store.rows)) for t in range(probes)),
            combine="concat",
            head=Linear("projection") if len(stores) > 1 else None,
        )
