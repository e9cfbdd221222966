"""The uncompressed table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Digit, LookupPlan, Probe, Store


@register
@dataclass(frozen=True)
class Full(Method):
    """The uncompressed table, E[x]; bit-equal to torch's own modules.

    Memory: n·d numbers.
    """

    name: ClassVar[str] = "full"

    def sizes(self, table: TableSpec) -> range:
        return range(table.num_embeddings, table.num_embeddings + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        rows, width = table.num_embeddings, table.embedding_dim
        return LookupPlan(
            rows,
            width,
            stores=(Store("weight", rows, width, table.dtype),),
            probes=(Probe("weight", Digit(1, rows)),),
        )

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        return {plan.stores[0].name: weight.detach()}
