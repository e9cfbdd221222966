"""Sums of a quotient's and a remainder's row, both sparse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from embcompress.fitting import fit_stores, new_stores
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.methods.qr import root_ceiling
from embcompress.phases import Phase, PhasedTable, Score, TableForm
from embcompress.plan import MOST_STORED, Digit, LookupPlan, Probe, Store
from embcompress.procedure import TableProcedure
from embcompress.soft_thresholds import (
    GRANULARITIES,
    Granularity,
    ThresholdSearch,
    check_search,
    found_mask,
    search_plan,
    set_first_thresholds,
)
from embcompress.sparse_layout import sparse_store
from embcompress.sparse_rows import best_mask, kept_stores, with_starts


@register
@dataclass(frozen=True)
class CERP(Method):
    """Sum of a quotient's and a remainder's row, both pruned by learned thresholds.

    E[x] = P[x mod m] + Q[x div m], where single numbers of P and Q are kept: two ids share a row
    in one of the tables at most, and what is pruned in one may be kept in the other. In the first
    phase both tables are read through soft thresholds that are learned, as in :class:`PEP`; the
    second trains the numbers that are kept from the start values that they had.

    Memory: for k kept numbers 4·k bytes, and a mask or positions that tell which they are, as in
    :class:`PEP`, where k is ``density`` of the (m + ⌈n/m⌉)·d numbers. Budgets below that of the
    smallest tables, m = ⌈√n⌉, keep fewer numbers of these, and budgets above that of the largest,
    m = n, more.

    Source: Liang et al., "Learning compact compositional embeddings via regularized pruning for
    recommendation", ICDM 2023, section 3. What differs: no regularizer asks the two rows of an id
    to keep different columns; the bytes of the tables are given by the budget, and thresholds
    rise as in :class:`PEP`.

    Attributes:
        density: share of the numbers that is kept, in (0, 1], at budgets that allow it.
        granularity, epochs, decay, start, interval: as in :class:`PEP`.
    """

    name: ClassVar[str] = "cerp"
    density: float = 0.5
    granularity: Granularity = "column"
    epochs: int = 2
    decay: float = 0.005
    start: float = 0.1
    interval: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}"
            )
        check_search(self.epochs, self.decay, self.start, self.interval)

    # -- the plan

    def sizes(self, table: TableSpec) -> range:
        """Kept numbers of the smallest remainders, then rows that these have more, then kept
        numbers that the largest remainders have more."""
        _, largest = self._turns(table)
        numbers = min(table.num_embeddings * table.embedding_dim, MOST_STORED)
        more = numbers - self._stored(table.num_embeddings, table.embedding_dim)
        return range(1, largest + more + 1)

    def _turns(self, table: TableSpec) -> tuple[int, int]:
        """The sizes of the smallest and the largest tables at the density."""
        root = root_ceiling(table.num_embeddings, 2)
        smallest = self._stored(root, table.embedding_dim)
        return smallest, smallest + table.num_embeddings - root

    def _stored(self, rows: int, width: int) -> int:
        return max(1, min(int(self.density * rows * width), MOST_STORED))

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        n, d = table.num_embeddings, table.embedding_dim
        smallest, largest = self._turns(table)
        modulus = root_ceiling(n, 2) + min(max(size, smallest), largest) - smallest
        stores: list[Store] = []
        for name, rows in (("remainder", modulus), ("quotient", -(-n // modulus))):
            stored = self._stored(rows, d)
            if size < smallest:
                stored = max(1, size * rows // modulus)
            elif size > largest and name == "remainder":
                stored += size - largest
            stores += sparse_store(name, rows, d, stored, table.dtype)
        return LookupPlan(
            n,
            d,
            stores=tuple(stores),
            probes=(
                Probe("remainder", Digit(1, modulus)),
                Probe("quotient", Digit(modulus, -(-n // modulus))),
            ),
        )

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Both tables by least squares, and of these the numbers of largest magnitude.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        dense = dense_plan(plan)
        stores = fit_stores(dense, new_stores(dense, table.seed), weight.detach(), table.counts)
        fitted: dict[str, Tensor] = {}
        for name, values in stores.items():
            fitted |= kept_stores(plan, values, best_mask(plan, values.abs(), name), name)
        return fitted

    # -- training

    def phases(self) -> tuple[Phase, Phase]:
        return Phase("search", self.epochs), Phase("retrain", weights="initial")

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        if phase != self.phases()[0]:
            return None
        return ThresholdSearch(self.decay, self.interval)

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        if phase == self.phases()[0]:
            return [self._search(table) for table in tables]
        return [self._final(table) for table in tables]

    def _search(self, table: PhasedTable) -> TableForm:
        plan = search_plan(table.built, self.granularity)
        stores = {**table.new_stores(plan), **table.new_stores(dense_plan(table.built))}
        set_first_thresholds(plan, stores, self.start)
        return TableForm(plan, stores)

    def _final(self, table: PhasedTable) -> TableForm:
        plan, stores = table.built, table.new_stores(dense_plan(table.built))
        kept: dict[str, Tensor] = {}
        for name, values in stores.items():
            kept |= kept_stores(plan, values, found_mask(table, name), name)
        return TableForm(plan, with_starts(plan, kept))


def dense_plan(plan: LookupPlan) -> LookupPlan:
    """The plan with all numbers of both tables."""
    stores = [replace(s, sparsity=None) for s in plan.stores if s.sparsity is not None]
    return replace(plan, stores=tuple(stores))
