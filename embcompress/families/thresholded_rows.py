"""Sparse rows that learned soft thresholds choose, and that are then trained again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from embcompress.families.sparse_rows import WEIGHT, SparseRows, final_form, full_weight
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.phases import Phase, PhasedTable, TableForm
from embcompress.procedures.soft_thresholds import (
    GRANULARITIES,
    Granularity,
    ThresholdSearch,
    check_search,
    found_mask,
    search_plan,
    set_first_thresholds,
)


@dataclass(frozen=True)
class ThresholdedRows(SparseRows):
    """What :class:`~embcompress.PEP` and :class:`~embcompress.CERP` have in common.

    Attributes:
        granularity: what has a threshold of its own: the ``"table"``, a ``"column"``, a ``"row"``
            or an ``"element"`` (a threshold for every number: twice the memory in training).
        epochs: of the first phase, ≥ 1.
        decay: share by which a threshold shrinks in a step, in [0, 1).
        start: the first threshold, in standard deviations of the start values, > 0.
        interval: steps from one count of what is left to the next, ≥ 1.
    """

    granularity: Granularity = "column"
    epochs: int = 2
    decay: float = 0.005
    start: float = 0.1
    interval: int = 10

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}"
            )
        check_search(self.epochs, self.decay, self.start, self.interval)

    def phases(self) -> tuple[Phase, Phase]:
        return Phase("search", self.epochs), Phase("retrain", weights="initial")

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        if phase != self.phases()[0]:
            return None
        return ThresholdSearch(self.decay, self.interval)

    def start_weight(self, table: PhasedTable) -> Tensor:
        """All numbers of the store at their start values, the same in both phases."""
        return full_weight(table)

    def search(self, table: PhasedTable) -> TableForm:
        plan = search_plan(table.built, self.granularity)
        stores = {**table.new_stores(plan), WEIGHT: self.start_weight(table)}
        set_first_thresholds(plan, stores, self.start)
        return TableForm(plan, stores)

    def final(self, table: PhasedTable) -> TableForm:
        return final_form(table, self.start_weight(table), found_mask(table, WEIGHT))
