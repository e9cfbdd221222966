"""A hashed row for every id, times a number of the id's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Digit, Hash, LookupPlan, Probe, Store, Weight


@register
@dataclass(frozen=True)
class MemCom(Method):
    """MEmCom, E[h(x)]·v[x]: ids share rows by a hash, and each has a multiplier of its own.

    Two ids that share a row are told apart by one number each. With ``bias`` every id has a second
    number: E[h(x)]·v[x] + w[x]·u.

    Memory: m·d + n numbers for m rows, so at least n (6.25 % of a table of width 16); with
    ``bias`` m·d + 2·n + d.

    Source: Pansare et al., "Learning compressed embeddings for on-device inference", MLSys 2022.
    What differs: rows are found by a keyed hash, not by x mod m; v and w start at 1; the paper
    adds w[x] to every column (u = 1), here the direction u is learned.

    Attributes:
        bias: whether ids have a second number.
    """

    name: ClassVar[str] = "memcom"
    bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias must be True or False, got {self.bias!r}")

    def sizes(self, table: TableSpec) -> range:
        """Numbers of shared rows."""
        return range(1, table.num_embeddings + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        n, d = table.num_embeddings, table.embedding_dim
        own = Digit(1, n)
        stores = [Store("weight", size, d, table.dtype), Store("scale", n, 1, table.dtype)]
        probes = [Probe("weight", Hash(table.key(0), size), Weight("scale", own))]
        if self.bias:
            stores += [Store("direction", 1, d, table.dtype), Store("bias", n, 1, table.dtype)]
            probes.append(Probe("direction", Digit(1, 1), Weight("bias", own)))
        return LookupPlan(n, d, stores=tuple(stores), probes=tuple(probes))
