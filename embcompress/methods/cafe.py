"""Rows of their own for the ids that are hot in training, shared ones for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from embcompress.layouts.hot_rows import HotRows
from embcompress.layouts.slots import KEYS, SlotLayout, static_keys
from embcompress.methods import register
from embcompress.methods.base import TableSpec
from embcompress.plan import LookupPlan
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.promotion import Promotion


@register
@dataclass(frozen=True)
class Cafe(HotRows):
    """CAFE: ids with large gradients come to own rows in training; the others share, E[h(x)].

    A hash table of keys with ``ways`` slots a bucket says which ids own a row. Under
    :class:`~embcompress.TrainingProcedure` a sketch (:mod:`embcompress.procedures.hot_sketch`) sums
    the norms of the gradients of an id's vectors, with ``watched`` more slots a bucket than there
    are rows. Every ``interval`` steps the strongest candidates of a bucket take over the rows of
    its weakest ids (score > ``margin`` · score), and all scores are multiplied by ``decay``. A
    promoted id's row starts as the shared row that it read before. No memory, neither in serving
    nor in training, grows with the number of ids, so tables can be compressed 10,000 times.

    Memory: m·d numbers for m rows, and ⌈log2(n + 1)⌉ bits for every row that is owned (32 where ids
    have more bits: then about one id in 2**32 / ``ways`` is taken for another). Training holds 12
    bytes for every slot of the sketch.

    Source: Zhang et al., "CAFE: towards compact, adaptive, and fast embedding for large-scale
    recommendation models", SIGMOD 2024. What differs: each bucket has its own hot ids, the
    strongest ones by a margin, where the paper compares all scores with one threshold; scores are
    kept apart from the keys, which alone are needed to serve; with counts of the ids, the most
    frequent ones own the rows at the start. The shared rows are of one level.

    Attributes:
        hot: share of the rows that ids own, in (0, 1).
        ways: slots of a bucket, ≥ 1.
        importance: what is summed: ``"gradient"``, or ``"frequency"``, how often an id occurs.
        watched: slots of a bucket beside them in the sketch, for ids that own no row, ≥ 1.
        interval: steps from one promotion to the next, ≥ 1.
        stop: the last step at which there may be one (None: no last).
        decay: scores are multiplied by it at every promotion, in [0, 1].
        margin: so many times the score of an id a candidate must have to take over its row, ≥ 1.
        state: the optimizer's state of a promoted row: ``"copied"`` with the row, or ``"fresh"``.
    """

    name: ClassVar[str] = "cafe"
    ways: int = 4
    importance: Literal["gradient", "frequency"] = "gradient"
    watched: int = 4
    interval: int = 20
    stop: int | None = None
    decay: float = 0.98
    margin: float = 1.1
    state: Literal["copied", "fresh"] = "copied"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.watched < 1 or self.interval < 1:
            raise ValueError(
                f"watched and interval must be at least 1, got {self.watched}, {self.interval}"
            )
        if not 0 <= self.decay <= 1 or not self.margin >= 1:
            raise ValueError(
                f"decay must be in [0, 1] and margin at least 1, got {self.decay}, {self.margin}"
            )
        if self.importance not in ("gradient", "frequency"):
            raise ValueError(
                f"importance must be 'gradient' or 'frequency', got {self.importance!r}"
            )
        if self.state not in ("copied", "fresh"):
            raise ValueError(f"state must be 'copied' or 'fresh', got {self.state!r}")

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        if stores[KEYS].device.type != "meta":
            layout = SlotLayout.of(plan)
            known = table.counts is not None
            keys = static_keys(table, layout, plan.padding_idx) if known else layout.empty()
            stores[KEYS].copy_(keys)

    def procedure(self) -> TableProcedure:
        return Promotion(self)
