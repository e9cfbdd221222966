"""Single weights pruned by thresholds that are learned, and trained again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from embcompress.methods import register
from embcompress.phases import Phase, PhasedTable, TableForm
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
from embcompress.sparse_rows import WEIGHT, SparseRows, final_form, full_weight


@register
@dataclass(frozen=True)
class PEP(SparseRows):
    """Single weights pruned by learned soft thresholds, then trained again from the start.

    In its first phase the full table is read through thresholds s,

        v = sign(e) · max(|e| - sigmoid(s), 0)

    and e and s both learn from the loss; s is drawn towards 0 besides. When as many numbers are
    left as the budget holds, they are what is kept. The second phase trains these from the start
    values that they had in the first; the layers around start again, too. Where the first phase
    ends too early, the numbers that are farthest above their thresholds are kept.

    Memory: for k kept numbers 4·k bytes, and the smaller of n·d bits and about k·(log2(d) + 6)
    bits to tell which they are, with a few bits more for every block of rows; all of it is in the
    budget. While it searches, a table holds n·d numbers and the thresholds, and its lookups are
    run by the slow reference engine.

    Source: Liu et al., "Learnable embedding sizes for recommender systems", ICLR 2021, section 3.
    What differs: thresholds start at a share of the deviation of the start values and shrink by a
    decay of their own, not by the optimizer's; the mask has exactly as many numbers as the plan.

    Attributes:
        granularity: what has a threshold of its own: the ``"table"``, a ``"column"``, a ``"row"``
            or an ``"element"`` (a threshold for every number: twice the memory in training).
        epochs: of the first phase, ≥ 1.
        decay: share by which a threshold shrinks in a step, in [0, 1).
        start: the first threshold, in standard deviations of the start values, > 0.
        interval: steps from one count of what is left to the next, ≥ 1.
    """

    name: ClassVar[str] = "pep"
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

    def search(self, table: PhasedTable) -> TableForm:
        plan = search_plan(table.built, self.granularity)
        stores = {**table.new_stores(plan), WEIGHT: full_weight(table)}
        set_first_thresholds(plan, stores, self.start)
        return TableForm(plan, stores)

    def final(self, table: PhasedTable) -> TableForm:
        return final_form(table, full_weight(table), found_mask(table, WEIGHT))
