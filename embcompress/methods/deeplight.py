"""Single weights pruned by magnitude while the table trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.families.sparse_rows import (
    WEIGHT,
    SparseRows,
    best_mask,
    final_form,
    unpruned_form,
)
from embcompress.methods import register
from embcompress.procedures.base import TableProcedure, TrainedTable
from embcompress.procedures.phases import Phase, PhasedTable, TableForm

_DECAY = 0.99


@register
@dataclass(frozen=True)
class DeepLight(SparseRows):
    """Single weights pruned by magnitude while training, E[x] of the numbers that are kept.

    In its first phase the full table trains, and every ``interval`` steps the smallest numbers
    are set to zero, after t steps the share

        target · (1 - 0.99^(t / damping))

    of all, where the target is the share that the budget has no room for. A number that was set to
    zero goes on learning, and stays if it has grown before the next time. Then the largest numbers
    are kept, as many as the budget holds, and trained on.

    Memory: for k kept numbers 4·k bytes, and the smaller of n·d bits and about k·(log2(d) + 6)
    bits to tell which they are, with a few bits more for every block of rows; all of it is in the
    budget. While it trains, a table holds n·d numbers and n·d bits.

    Source: Deng et al., "DeepLight: Deep lightweight feature interactions for accelerating CTR
    predictions in ad serving", WSDM 2021, section 4.2 and algorithm 1. What differs: only tables
    are pruned, each to what its bytes allow; the damping is 1 (100 in the paper, whose epochs
    have tens of thousands of steps); and what is pruned in the end stays so while the rest is
    trained on.

    Attributes:
        epochs: of the first phase, ≥ 1.
        interval: steps from one pruning to the next, ≥ 1.
        damping: the larger, the later it prunes, > 0.
    """

    name: ClassVar[str] = "deeplight"
    epochs: int = 2
    interval: int = 10
    damping: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.interval < 1 or not self.damping > 0:
            raise ValueError(
                "epochs and interval must be at least 1 and damping positive, got "
                f"{self.epochs}, {self.interval}, {self.damping}"
            )

    def phases(self) -> tuple[Phase, Phase]:
        return Phase("prune", self.epochs), Phase("train")

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        return MagnitudePruning(self) if phase == self.phases()[0] else None

    def search(self, table: PhasedTable) -> TableForm:
        return unpruned_form(table)

    def final(self, table: PhasedTable) -> TableForm:
        weight = table.stores()[WEIGHT].detach()
        return final_form(table, weight, best_mask(table.built, weight.abs()))


class MagnitudePruning(TableProcedure):
    """Sets ever more of the smallest numbers of a sparse store's latents to zero."""

    def __init__(self, method: DeepLight) -> None:
        self._method = method

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        return {}

    def is_due(self, number: int) -> bool:
        return number % self._method.interval == 0

    def step(self, table: TrainedTable, number: int) -> None:
        sparsity, weight = table.plan.store(WEIGHT).sparsity, table.stores()[WEIGHT]
        assert sparsity is not None
        share = 1 - _DECAY ** (number / self._method.damping)
        pruned = int(share * (weight.numel() - sparsity.stored))
        if pruned > 0:
            magnitudes = weight.detach().abs()
            threshold = torch.kthvalue(magnitudes.reshape(-1), pruned).values
            weight.masked_fill_(magnitudes <= threshold, 0)
