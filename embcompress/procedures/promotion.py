"""Promotion of hot ids to rows of their own during training, and demotion of what has cooled."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from embcompress.importance import sum_by_id
from embcompress.layouts.packing import absent_code, unpack_codes
from embcompress.layouts.slots import KEYS, WEIGHT, SlotLayout, read_rows
from embcompress.plan import Digit
from embcompress.procedures.base import Observes, TableProcedure, TrainedTable
from embcompress.procedures.hot_sketch import EMPTY, add, promote

IDS, SCORES, MOVES = "sketch_ids", "sketch_scores", "moves"


class PromotionSettings(Protocol):
    """When ids are promoted, and which; see :class:`embcompress.Cafe`."""

    @property
    def importance(self) -> Literal["gradient", "frequency"]: ...
    @property
    def watched(self) -> int: ...
    @property
    def interval(self) -> int: ...
    @property
    def stop(self) -> int | None: ...
    @property
    def decay(self) -> float: ...
    @property
    def margin(self) -> float: ...
    @property
    def state(self) -> Literal["copied", "fresh"]: ...


class Promotion(TableProcedure):
    """Keeps the ids of the largest gradients, or the most frequent ones, in a table's slots.

    Its tensors: a :mod:`~embcompress.procedures.hot_sketch` whose first slots of each bucket are
    those of the table, ``sketch_ids`` (buckets, ways + watched) int64 and ``sketch_scores``
    float32; ``moves``, how many rows have changed hands.
    """

    from_first = (IDS, SCORES)

    def __init__(self, settings: PromotionSettings) -> None:
        self.settings = settings
        self.observes: Observes = "gradients" if settings.importance == "gradient" else "ids"

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        layout, keys = SlotLayout.of(table.plan), table.stores()[KEYS]
        shape = (layout.bucket.buckets, layout.ways + self.settings.watched)
        ids = torch.full(shape, EMPTY, device=keys.device)
        # Slots that hold a hash of their id start as empty: who is there shows when they are taken.
        if isinstance(layout.tag, Digit):
            known = unpack_codes(keys, 0, layout.hot, layout.bits)
            known[known == absent_code(layout.bits)] = EMPTY
            ids[:, : layout.ways] = known.view(-1, layout.ways)
        return {
            IDS: ids,
            SCORES: torch.zeros(shape, device=keys.device),
            MOVES: torch.zeros((), dtype=torch.int64, device=keys.device),
        }

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        layout = SlotLayout.of(table.plan)
        distinct, sums = sum_by_id(ids, amounts)
        slots = table.tensor(IDS), table.tensor(SCORES)
        add(distinct, sums, *slots, layout.bucket.key, layout.ways)

    def is_due(self, number: int) -> bool:
        return number % self.settings.interval == 0

    def step(self, table: TrainedTable, number: int) -> None:
        if self.settings.stop is None or number <= self.settings.stop:
            self.promote(table)
        table.tensor(SCORES).mul_(self.settings.decay)

    @torch.no_grad()
    def promote(self, table: TrainedTable) -> None:
        """Give slots to the strongest ids of each bucket.

        A promoted id's row starts as what the id has read so far; what has lost its slot reads
        its shared row from now on.
        """
        layout, stores = SlotLayout.of(table.plan), table.stores()
        slot_ids = table.tensor(IDS)
        slots = promote(slot_ids, table.tensor(SCORES), layout.ways, self.settings.margin)
        ids = slot_ids[slots // layout.ways, slots % layout.ways]
        source, target = read_rows(table.plan, stores, ids), layout.shared + slots
        stores[WEIGHT][target] = stores[WEIGHT][source]
        for state in table.row_states(WEIGHT):
            copied = self.settings.state == "copied"
            state.tensor[target] = state.tensor[source] if copied else state.fresh
        layout.write(stores[KEYS], slots, ids)
        table.tensor(MOVES).add_(slots.numel())
