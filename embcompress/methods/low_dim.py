"""Narrow rows and a projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.approximation.fitting import principal_directions
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Digit, Linear, LookupPlan, Probe, Store


@register
@dataclass(frozen=True)
class LowDim(Method):
    """Narrow rows and a projection, P·E[x]: a factorization of the table.

    Every id keeps a row of its own, of width w < d. Bags are pooled before the projection, so it
    runs once a bag.

    Memory: n·w + d·w numbers, w from 1 to d - 1 (1 where d = 1).

    Source: Lan et al., "ALBERT", ICLR 2020, section 3.1 (factorized embedding parameterization).
    """

    name: ClassVar[str] = "low_dim"

    def sizes(self, table: TableSpec) -> range:
        return range(1, max(2, table.embedding_dim))

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        rows, width = table.num_embeddings, table.embedding_dim
        return LookupPlan(
            rows,
            width,
            stores=(
                Store("weight", rows, size, table.dtype),
                Store("projection", width, size, table.dtype),
            ),
            probes=(Probe("weight", Digit(1, rows)),),
            head=Linear("projection"),
        )

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """The best approximation of that rank, by the singular vectors of the table.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        rank = plan.store("weight").width
        directions = principal_directions(weight.detach(), rank, table.counts)
        return {"weight": weight.detach() @ directions, "projection": directions}
