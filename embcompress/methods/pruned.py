"""Pruned vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from embcompress.importance import strongest
from embcompress.layouts.kept_ids import choose_kept_ids
from embcompress.layouts.pruned import CODES, MOST_ROWS, WEIGHT, PrunedLayout
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Digit, Hash, LookupPlan
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.reallocation import Reallocation


@register
@dataclass(frozen=True)
class Pruned(Method):
    """Rows for the ids that matter most; the others share a fallback row.

    A packed code for every id says which row it owns, in the fewest bits that can number the
    rows; "absent" sends it to the fallback.

    Which ids are kept: with counts the most frequent ones (ties by id); without counts those with
    the smallest keyed hash, a choice that is the same for equal names and seeds and that training
    under :class:`~embcompress.TrainingProcedure` improves: every ``interval`` steps the pruned
    ids that have become more important than the weakest kept ones take over their rows. See
    also :func:`embcompress.prune_` and :func:`embcompress.restore_` for trained tables, and
    :func:`embcompress.count_ids` and :func:`embcompress.read_ids` for counts from a corpus or a
    file::

        counts = ec.count_ids(batches, num_embeddings)
        table = ec.Embedding(num_embeddings, 64, method="pruned", budget="10%", counts=counts)

    Memory: (k + fallback)·d numbers for k kept ids, and ⌈log2(k + fallback + 1)⌉ bits an id.
    Training holds one float32 an id more where rows are reallocated (and, while that happens,
    about 25 bytes an id).

    Source: Williams & Aletras, "Frustratingly simple memory efficiency for pre-trained language
    models via dynamic embedding pruning", arXiv 2309.08708, 2023. Reallocation by decayed
    importance: after Lai et al., "AdaEmbed", OSDI 2023.

    Attributes:
        fallback: rows that the pruned ids share, by a keyed hash where there are several: their
            number (int, ≥ 1), or a share of the kept rows (float in (0, 1]).
        min_count: with counts, ids that occur less often get no row, whatever the budget.
        importance: ``"frequency"``: how often an id occurs in training batches;
            ``"gradient"``: the sum of the norms of its vectors' gradients; None: the kept ids
            stay the same.
        interval: steps from one reallocation to the next, ≥ 1.
        start, stop: the first and the last step at which there may be one (None: no last).
        rate: at most this share of the kept rows changes hands at a time, in (0, 1].
        decay: importance is multiplied by it at every reallocation, in [0, 1].
        new_rows: an id that takes over a row starts from its ``"fallback"``'s values, or from
            ``"zero"``. Its optimizer state starts fresh.
    """

    name: ClassVar[str] = "pruned"
    fallback: int | float = 1
    min_count: int = 0
    importance: Literal["frequency", "gradient"] | None = "frequency"
    interval: int = 100
    start: int = 0
    stop: int | None = None
    rate: float = 0.25
    decay: float = 0.9
    new_rows: Literal["fallback", "zero"] = "fallback"

    def __post_init__(self) -> None:
        shared = self.fallback
        if isinstance(shared, bool) or not (
            shared >= 1 if isinstance(shared, int) else 0 < shared <= 1
        ):
            raise ValueError(
                f"fallback must be a number of rows (int, ≥ 1) or a share of the kept rows "
                f"(float in (0, 1]), got {self.fallback!r}"
            )
        if self.importance not in ("frequency", "gradient", None):
            raise ValueError(
                f"importance must be 'frequency', 'gradient' or None, got {self.importance!r}"
            )
        if self.new_rows not in ("fallback", "zero"):
            raise ValueError(f"new_rows must be 'fallback' or 'zero', got {self.new_rows!r}")
        if self.min_count < 0 or self.interval < 1 or self.start < 0:
            raise ValueError(
                "min_count and start must not be negative and interval must be at least 1, got "
                f"{self.min_count}, {self.start}, {self.interval}"
            )
        if not 0 < self.rate <= 1 or not 0 <= self.decay <= 1:
            raise ValueError(
                f"rate must be in (0, 1] and decay in [0, 1], got {self.rate}, {self.decay}"
            )

    # -- the plan

    def sizes(self, table: TableSpec) -> range:
        """Numbers of kept ids."""
        most = table.num_embeddings
        if table.counts is not None and self.min_count:
            most = int((table.counts >= self.min_count).sum())
        if isinstance(self.fallback, int):
            most = min(most, MOST_ROWS - self.fallback)
        else:
            most = min(most, int(MOST_ROWS / (1 + self.fallback)))
        return range(1, max(1, most) + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        return self.layout(table, size).plan(table.dtype)

    def layout(self, table: TableSpec, size: int) -> PrunedLayout:
        """The layout with that many kept ids."""
        rows = self.fallback if isinstance(self.fallback, int) else int(self.fallback * size)
        # Never more rows than there are ids to read them.
        rows = max(1, min(rows, table.num_embeddings - size))
        address = Digit(1, 1) if rows == 1 else Hash(table.key(0), rows)
        return PrunedLayout(table.num_embeddings, table.embedding_dim, size, address)

    # -- which ids

    def choose(
        self,
        table: TableSpec,
        size: int,
        padding_idx: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """(size,) int64 the ids to keep; see
        :func:`embcompress.layouts.kept_ids.choose_kept_ids`."""
        return choose_kept_ids(table, size, padding_idx, device)

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        layout, codes = PrunedLayout.of(plan), stores[CODES]
        if codes.device.type != "meta":
            kept = self.choose(table, layout.kept, plan.padding_idx, codes.device)
            codes.copy_(layout.codes(kept))

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Kept rows exactly, and fallback rows that are the means of the vectors that read them.

        Without counts the rows are kept that are farthest from the table's mean.
        """
        layout = PrunedLayout.of(plan)
        if table.counts is None:
            distance = (weight.float() - weight.float().mean(0)).square().sum(1)
            kept = strongest(torch.nan_to_num(distance, nan=torch.inf), layout.kept).sort().values
        else:
            kept = self.choose(table, layout.kept, plan.padding_idx, weight.device)
        rows = torch.cat([layout.mean_fallback(weight, kept, table.counts), weight[kept]])
        dtype = getattr(torch, plan.store(WEIGHT).dtype)
        return {WEIGHT: rows.to(dtype), CODES: layout.codes(kept)}

    # -- training

    def procedure(self) -> TableProcedure | None:
        return None if self.importance is None else Reallocation(self)
