"""One array of numbers for all tables: random offset block embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from embcompress.methods import register
from embcompress.methods.base import JointMethod, TableSpec
from embcompress.plan import Hash, LookupPlan, Probe, Sign, Store

#: Columns of a chunk where the widths allow it: half a cache line of float32.
_CHUNK = 8


@register
@dataclass(frozen=True)
class Robe(JointMethod):
    """ROBE, ±M[h₁(x) : h₁(x)+Z] ‖ … ‖ ±M[hₚ(x) : hₚ(x)+Z]: chunks of one array of all tables.

    An id's vector is p = d / Z chunks of Z consecutive numbers of the array M. Each begins where a
    hash of the id says, and is multiplied by a hashed sign. Chunks overlap, so that any number of
    M is in Z chunks, at every place of them. Keys come from the tables' *names*.

    Memory: m numbers for all tables together, any m of at least Z (steps of ``stride``).

    Source: Desai, Chou, Shrivastava: "Random offset block embedding array (ROBE) for CriteoTB
    benchmark MLPerf DLRM model", MLSys 2022, sections 3 and 4. What differs: M is no circle, no
    chunk wraps round its end, so the Z - 1 numbers at either end are in fewer chunks; a chunk is of
    one vector (Z ≤ d); and hashes are keyed by the tables' names instead of their positions.

    Attributes:
        chunk: Z; it divides every table's width. None: the largest common divisor of the widths
            that divides 8, half a cache line.
        stride: chunks begin at multiples of it; it divides Z. 1 as in the paper. Gradients are
            added up in pieces of ``stride`` numbers, so larger ones train faster.
        signed: whether chunks have hashed signs.
        group: tables with the same group, method, seed and dtype share M. None: each has an array
            of its own, in proportion to its dense size; so trained tables are approximated.
    """

    name: ClassVar[str] = "robe"
    chunk: int | None = None
    stride: int = 1
    signed: bool = True
    group: str | None = "robe"

    def __post_init__(self) -> None:
        for field in ("chunk", "stride"):
            value = getattr(self, field)
            if field == "chunk" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be an integer of at least 1, got {value!r}")
        if self.chunk is not None and self.chunk % self.stride:
            raise ValueError(f"stride must divide chunk = {self.chunk}, got {self.stride}")
        if self.group == "":
            raise ValueError("group must not be empty; None keeps the tables' arrays apart")

    def columns(self, tables: Sequence[TableSpec]) -> int:
        """Z for these tables.

        Raises:
            ValueError: ``chunk`` does not divide a table's width, or ``stride`` does not divide
                the chunk that the widths allow.
        """
        divisor = math.gcd(*(table.embedding_dim for table in tables))
        chunk = math.gcd(divisor, _CHUNK) if self.chunk is None else self.chunk
        if divisor % chunk:
            raise ValueError(
                f"chunk = {chunk} does not divide the tables' widths, whose greatest common "
                f"divisor is {divisor}"
            )
        if chunk % self.stride:
            raise ValueError(
                f"stride = {self.stride} does not divide the chunks of {chunk} numbers that the "
                f"tables' widths allow; set stride=1, or a chunk that it divides"
            )
        return chunk

    def group_sizes(self, tables: Sequence[TableSpec]) -> range:
        numbers = sum(table.num_embeddings * table.embedding_dim for table in tables)
        return range(1, (numbers - self.columns(tables)) // self.stride + 2)

    def group_plans(self, tables: Sequence[TableSpec], size: int) -> list[LookupPlan]:
        chunk = self.columns(tables)
        numbers = [table.num_embeddings * table.embedding_dim for table in tables]
        plans = []
        for table, own in zip(tables, numbers, strict=True):
            if self.group is None:
                rows = max(1, size * own // sum(numbers))
                plans.append(self._plan(table, rows, chunk, table.dtype, ""))
            else:
                plans.append(self._plan(table, size, chunk, tables[0].dtype, self.group))
        return plans

    def of_dtype(self, dtype: str) -> JointMethod:
        return self if self.group is None else replace(self, group=f"{self.group}-{dtype}")

    def for_trained_tables(self) -> JointMethod:
        return replace(self, group=None)

    def _plan(self, table: TableSpec, rows: int, chunk: int, dtype: str, shared: str) -> LookupPlan:
        """The plan of an array in which chunks may begin at ``rows`` places."""
        stride = self.stride if self.stride < chunk else None
        count = table.embedding_dim // chunk
        signs = [Sign(table.key(count + t)) if self.signed else None for t in range(count)]
        return LookupPlan(
            table.num_embeddings,
            table.embedding_dim,
            stores=(Store("array", rows, chunk, dtype, shared=shared, stride=stride),),
            probes=tuple(
                Probe("array", Hash(table.key(t), rows), sign) for t, sign in enumerate(signs)
            ),
            combine="concat",
        )
