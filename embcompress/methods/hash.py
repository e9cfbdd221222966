"""Feature hashing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Hash, LookupPlan, Probe, Store


@register
@dataclass(frozen=True)
class Hashing(Method):
    """Feature hashing, E[h(x)]: ids share rows by a keyed hash.

    Memory: m·d numbers, for any number of rows m from 1 to n.

    Source: Weinberger et al., "Feature hashing for large scale multitask learning", ICML 2009,
    without their sign hash. Ids are mixed before they are reduced to a row, because plain
    ``x mod m`` makes structured ids collide.
    """

    name: ClassVar[str] = "hash"

    def sizes(self, table: TableSpec) -> range:
        return range(1, table.num_embeddings + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        return LookupPlan(
            table.num_embeddings,
            table.embedding_dim,
            stores=(Store("weight", size, table.embedding_dim, table.dtype),),
            probes=(Probe("weight", Hash(table.key(0), size)),),
        )
