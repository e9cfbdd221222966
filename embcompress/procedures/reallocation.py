"""Reallocation of rows during training: to the ids that matter more."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from embcompress.importance import observe, strongest, weakest
from embcompress.layouts.pruned import CODES, WEIGHT, PrunedLayout
from embcompress.procedures.base import Observes, TableProcedure, TrainedTable

IMPORTANCE, MOVES = "importance", "moves"


class ReallocationSettings(Protocol):
    """When rows change hands, and how fast; see :class:`embcompress.Pruned`."""

    @property
    def importance(self) -> Literal["frequency", "gradient"] | None: ...
    @property
    def interval(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int | None: ...
    @property
    def rate(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def new_rows(self) -> Literal["fallback", "zero"]: ...


class Reallocation(TableProcedure):
    """Keeps the most important ids of a pruned table in its rows.

    Its tensors: ``importance``, (num_embeddings,) float32, a decaying sum (write counts into it
    to start from them); ``moves``, how many rows have changed hands.
    """

    averaged = (IMPORTANCE,)

    def __init__(self, settings: ReallocationSettings) -> None:
        self.settings = settings
        self.observes: Observes = "gradients" if settings.importance == "gradient" else "ids"

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        device = table.stores()[CODES].device
        return {
            IMPORTANCE: torch.zeros(table.plan.num_embeddings, device=device),
            MOVES: torch.zeros((), dtype=torch.int64, device=device),
        }

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        observe(table.tensor(IMPORTANCE), ids, amounts)

    def is_due(self, number: int) -> bool:
        return number % self.settings.interval == 0

    def step(self, table: TrainedTable, number: int) -> None:
        settings = self.settings
        if settings.start <= number and (settings.stop is None or number <= settings.stop):
            self.reallocate(table)
        table.tensor(IMPORTANCE).mul_(settings.decay)

    @torch.no_grad()
    def reallocate(self, table: TrainedTable) -> None:
        """Give rows of the least important kept ids to the most important pruned ids.

        The weakest kept id is held against the strongest pruned one, the second weakest against
        the second strongest, and so on; a row changes hands where the pruned id's importance is
        strictly larger.
        """
        layout, stores = PrunedLayout.of(table.plan), table.stores()
        owned = layout.owned_rows(stores[CODES])
        leaving, coming = self._exchange(table.tensor(IMPORTANCE), owned)
        rows = owned[leaving]
        ids = torch.cat([leaving, coming])
        layout.set_owned_rows(stores[CODES], ids, torch.cat([torch.full_like(rows, -1), rows]))
        weight = stores[WEIGHT]
        if self.settings.new_rows == "zero":
            weight[rows] = 0
        else:
            weight[rows] = weight[layout.fallback_rows(coming)]
        for state in table.row_states(WEIGHT):
            state.tensor[rows] = state.fresh
        table.tensor(MOVES).add_(rows.numel())

    def _exchange(self, importance: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
        """Ids that lose their rows and ids that take these over, one for one."""
        importance = importance.float()
        kept, pruned = (owned >= 0).nonzero().flatten(), (owned < 0).nonzero().flatten()
        most = min(max(1, int(self.settings.rate * kept.numel())), kept.numel(), pruned.numel())
        leaving = kept[weakest(importance[kept], most)]
        coming = pruned[strongest(importance[pruned], most)]
        passes = importance[coming] > importance[leaving]  # true up to some place, then false
        return leaving[passes], coming[passes]
