"""Rows for the ids with the largest gradients; the others have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.importance import observe_half, strongest
from embcompress.layouts.kept_ids import choose_kept_ids
from embcompress.layouts.pruned import CODES, MOST_ROWS, WEIGHT, PrunedLayout
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import LookupPlan
from embcompress.procedures.base import TableProcedure, TrainedTable
from embcompress.procedures.reallocation import IMPORTANCE, Reallocation


@register
@dataclass(frozen=True)
class AdaEmbed(Method):
    """AdaEmbed: rows for the ids of the largest decayed gradients; the other ids read zero.

    A packed code for every id says which row it owns, "absent" that its vector is zero. Every
    ``interval`` steps under :class:`~embcompress.TrainingProcedure` the ids without a row that
    have become more important than the weakest ids with one take their rows over:

        importance[x] ← decay·importance[x]  at every reallocation
        importance[x] += Σ over occurrences of x in the batch of batch size·‖gradient of its vector‖

    Before that rows belong to the most frequent ids, where counts are known, or to those with the
    smallest keyed hash.

    Memory: k·d numbers for k ids with rows, and ⌈log2(k + 1)⌉ bits an id. Training holds two bytes
    an id more (and, while rows are reallocated, about 25 bytes an id).

    Source: Lai et al., "AdaEmbed: Adaptive embedding for large-scale recommendation models", OSDI
    2023. What differs: a table has its own number of rows, which the paper balances between
    tables; a reallocation is due by the number of steps, not by how much the ranking has changed.

    Attributes:
        interval: steps from one reallocation to the next, ≥ 1.
        start, stop: the first and the last step at which there may be one (None: no last).
        rate: at most this share of the rows changes hands at a time, in (0, 1].
        decay: importance is multiplied by it at every reallocation, in [0, 1].
    """

    name: ClassVar[str] = "adaembed"
    interval: int = 200
    start: int = 0
    stop: int | None = None
    rate: float = 0.5
    decay: float = 0.9

    def __post_init__(self) -> None:
        if self.interval < 1 or self.start < 0:
            raise ValueError(
                f"interval must be at least 1 and start not negative, got {self.interval}, "
                f"{self.start}"
            )
        if not 0 < self.rate <= 1 or not 0 <= self.decay <= 1:
            raise ValueError(
                f"rate must be in (0, 1] and decay in [0, 1], got {self.rate}, {self.decay}"
            )

    # -- the plan

    def sizes(self, table: TableSpec) -> range:
        """Numbers of ids that own a row."""
        return range(1, min(table.num_embeddings, MOST_ROWS) + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        return PrunedLayout(table.num_embeddings, table.embedding_dim, size, None).plan(table.dtype)

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        layout, codes = PrunedLayout.of(plan), stores[CODES]
        if codes.device.type != "meta":
            kept = choose_kept_ids(table, layout.kept, plan.padding_idx, codes.device)
            codes.copy_(layout.codes(kept))

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """The rows whose loss would cost most, exactly: by count times squared norm."""
        check_finite(weight)
        layout = PrunedLayout.of(plan)
        cost = weight.double().square().sum(1)
        if table.counts is not None:
            cost = cost * table.counts.to(cost)
        kept = strongest(cost, layout.kept).sort().values
        dtype = getattr(torch, plan.store(WEIGHT).dtype)
        return {WEIGHT: weight[kept].to(dtype), CODES: layout.codes(kept)}

    # -- training

    @property
    def importance(self) -> Literal["gradient"]:
        """What :class:`~embcompress.procedures.reallocation.Reallocation` goes by."""
        return "gradient"

    @property
    def new_rows(self) -> Literal["zero"]:
        """An id that takes over a row read zero before."""
        return "zero"

    def procedure(self) -> TableProcedure:
        return _HalfReallocation(self)


class _HalfReallocation(Reallocation):
    """Reallocation with an importance of two bytes an id."""

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        tensors = super().new_tensors(table)
        return {**tensors, IMPORTANCE: tensors[IMPORTANCE].half()}

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        # Of a mean loss gradients shrink with the batch; this keeps them in float16's range.
        observe_half(table.tensor(IMPORTANCE), ids, amounts * ids.numel())
