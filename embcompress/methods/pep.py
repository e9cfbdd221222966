"""Single weights pruned by thresholds that are learned, and trained again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from embcompress.families.thresholded_rows import ThresholdedRows
from embcompress.methods import register


@register
@dataclass(frozen=True)
class PEP(ThresholdedRows):
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

    Settings: :class:`~embcompress.families.thresholded_rows.ThresholdedRows`.
    """

    name: ClassVar[str] = "pep"
