"""Sums of a quotient's and a remainder's row, both sparse."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from embcompress.approximation.fitting import fit_stores, new_stores
from embcompress.families.sparse_rows import WEIGHT, best_mask, kept_stores
from embcompress.families.thresholded_rows import ThresholdedRows
from embcompress.layouts.factors import root_ceiling
from embcompress.layouts.sparse import sparse_store
from embcompress.methods import register
from embcompress.methods.base import TableSpec
from embcompress.plan import MOST_STORED, Digit, LookupPlan, Probe
from embcompress.procedures.phases import PhasedTable


@register
@dataclass(frozen=True)
class CERP(ThresholdedRows):
    """Sum of a quotient's and a remainder's row, both pruned by learned thresholds.

    E[x] = P[x mod b] + Q[x div ⌈n/b⌉], where single numbers of P and Q are kept: both have about
    b ≥ √n rows, no two ids have both rows in common, and what is pruned in one table may be kept
    in the other. In the first phase both tables are read through soft thresholds that are
    learned, as in :class:`PEP`; the second trains the numbers that are kept from the start values
    that they had.

    Memory: for k kept numbers 4·k bytes, and a mask or positions that tell which they are, as in
    :class:`PEP`. P and Q have as many rows as leave ``density`` of their about 2·b·d numbers to
    the k. Budgets below that of the smallest tables, b = ⌈√n⌉, keep fewer numbers of these, and
    budgets above that of the largest, b = n/2, more. The rows of Q lie after those of P in one
    store, so that a search finds how many numbers each of them keeps.

    Source: Liang et al., "Learning compact compositional embeddings via regularized pruning for
    recommendation", ICDM 2023, section 3. What differs: no regularizer asks the two rows of an id
    to keep different columns; the budget fixes how many numbers are kept, and thresholds rise as
    in :class:`PEP`. There every number has a threshold (``granularity="element"``), here a column,
    unless asked otherwise.

    Attributes:
        density: share of the numbers that is kept, in (0, 1], at budgets that allow it.
        granularity: as in :class:`~embcompress.families.thresholded_rows.ThresholdedRows`, and so
            are all others; with ``"table"`` and ``"column"`` P and Q have their thresholds in
            common.
    """

    name: ClassVar[str] = "cerp"
    density: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        super().__post_init__()

    # -- the plan

    def sizes(self, table: TableSpec) -> range:
        """How many numbers are kept."""
        n = table.num_embeddings
        rows = rows_of(n, _buckets(n)[-1])
        return range(1, min(rows * table.embedding_dim, MOST_STORED) + 1)

    def buckets(self, table: TableSpec, size: int) -> int:
        """b: the most of which ``size`` is the density's share of the numbers."""
        n, d = table.num_embeddings, table.embedding_dim
        choices = _buckets(n)
        # With b the rows of both tables rise, and so bytes rise with the size.
        fitting = bisect_right(choices, size, key=lambda b: int(self.density * d * rows_of(n, b)))
        return choices[max(fitting, 1) - 1]

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        n, d = table.num_embeddings, table.embedding_dim
        buckets = self.buckets(table, size)
        rows, span = rows_of(n, buckets), -(-n // buckets)
        stored = min(size, rows * d)  # at density 1 too few numbers for another row may be left
        return LookupPlan(
            n,
            d,
            stores=sparse_store(WEIGHT, rows, d, stored, table.dtype),
            probes=(
                Probe(WEIGHT, Digit(1, buckets)),
                Probe(WEIGHT, Digit(span, rows - buckets), offset=buckets),
            ),
        )

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Both tables by least squares, and of these the numbers of largest magnitude.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        dense = _dense_plan(plan)
        stores = fit_stores(dense, new_stores(dense, table.seed), weight.detach(), table.counts)
        values = stores[WEIGHT]
        return kept_stores(plan, values, best_mask(plan, values.abs()))

    # -- training

    def start_weight(self, table: PhasedTable) -> Tensor:
        return _dense_weight(table)


def _buckets(num_embeddings: int) -> range:
    """What b may be: two ids of one quotient are less than b apart, and there are at most as many
    rows as ids, where there are more than a few ids.
    """
    fewest = root_ceiling(num_embeddings, 2)
    return range(fewest, max(fewest, num_embeddings // 2) + 1)


def rows_of(num_embeddings: int, buckets: int) -> int:
    """Rows of both tables: the remainders, and the quotients that there are."""
    span = -(-num_embeddings // buckets)
    return buckets - (-num_embeddings // span)


def _dense_plan(plan: LookupPlan) -> LookupPlan:
    """The plan with all numbers of both tables."""
    return replace(plan, stores=(replace(plan.store(WEIGHT), sparsity=None),))


def _dense_weight(table: PhasedTable) -> Tensor:
    """Start values of both tables."""
    return table.new_stores(_dense_plan(table.built))[WEIGHT]
