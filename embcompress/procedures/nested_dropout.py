"""Nested dropout: columns behind a drawn width read as zero."""

from __future__ import annotations

import torch
from torch import Tensor

from embcompress.hashing import derive_key, hash_bucket
from embcompress.procedures.base import TableProcedure, TrainedTable

MASK = "mask"


def drawn_width(widths: tuple[int, ...], seed: int, step: int) -> int:
    """The width of a step, even over the widths: a hash of seed and step."""
    return widths[hash_bucket(step, derive_key(seed, "nested dropout", 0), len(widths))]


class NestedDropout(TableProcedure):
    """Draws the width of the next step, and lets the mask of a table pass so many columns.

    The mask is the store ``mask`` of the plan, (1, width), which multiplies every vector.

    Args:
        widths: that are drawn from; the full one of the table is always among them.
        seed: of the draws.
    """

    def __init__(self, widths: tuple[int, ...], seed: int) -> None:
        self.widths, self.seed = widths, seed

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        return {}

    def is_due(self, number: int) -> bool:
        return True

    def step(self, table: TrainedTable, number: int) -> None:
        mask = table.stores()[MASK]
        full = mask.shape[1]
        widths = tuple(sorted({*(w for w in self.widths if w < full), full}))
        mask.copy_(torch.arange(full, device=mask.device) < drawn_width(widths, self.seed, number))
