"""How long the lookups of a trained model's tables take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embcompress.collection import EmbeddingBagCollection, TableConfig
from embcompress.data.click_log import ClickLog
from embcompress.modules import EmbeddingBag

#: So many batches of so many rows make a round.
_BATCHES, _ROWS = 8, 512
#: There are this many rounds, or fewer once the time is over.
_ROUNDS, _LEAST_ROUNDS, _SECONDS = 41, 5, 1.0
#: Larger full tables are not built to be compared with.
_LARGEST_FULL = 256 << 20

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LookupTime:
    """Medians over rounds, in microseconds for 1,000 lookups (ids of bags).

    Attributes:
        microseconds: of the tables.
        full: of full tables for the same features, looked up in turn with them; None where these
            would be too large.
    """

    microseconds: float
    full: float | None


class LookupTimer:
    """Measures tables for the features of one click log.

    Every round looks the same batches up in the tables and in full ones, one after the other, so
    that whatever else the machine is doing slows both: times of two runs are best compared by
    their ratios to the full tables' of the same run.

    Args:
        log: the click log.
        width: of the tables.
    """

    def __init__(self, log: ClickLog, width: int) -> None:
        rows = [
            slice(start, min(start + _ROWS, len(log)))
            for start in range(0, min(_BATCHES * _ROWS, len(log)), _ROWS)
        ]
        batches = [log.batch(part) for part in rows]
        self.batches: Batches = [(batch.ids, batch.offsets) for batch in batches]
        self.lookups = sum(len(batch.ids) for batch in batches)
        tables = [TableConfig(f"t_{f.name}", f.num_embeddings, width) for f in log.features]
        dense = sum(table.num_embeddings * width * 4 for table in tables)
        self.full = EmbeddingBagCollection(tables) if dense <= _LARGEST_FULL else None

    @torch.no_grad()
    def measure(self, tables: EmbeddingBagCollection) -> LookupTime:
        """Time the deployed tables."""
        contestants = [tables] if self.full is None else [tables, self.full]
        for contestant in contestants:
            contestant.eval()
            self._round(contestant)  # allocates, and fills caches
        times: list[list[float]] = [[] for _ in contestants]
        end = time.perf_counter() + _SECONDS
        for number in range(_ROUNDS):
            if number >= _LEAST_ROUNDS and time.perf_counter() > end:
                break
            for contestant, seconds in zip(contestants, times, strict=True):
                seconds.append(self._round(contestant))
        scale = 1e6 * 1000 / max(self.lookups, 1)
        medians = [scale * statistics.median(seconds) for seconds in times]
        return LookupTime(medians[0], medians[1] if len(medians) > 1 else None)

    def _round(self, tables: EmbeddingBagCollection) -> float:
        """Seconds for all batches."""
        started = time.perf_counter()
        for ids, offsets in self.batches:
            tables(ids, offsets)
        return time.perf_counter() - started


def lookup_settings(tables: EmbeddingBagCollection) -> list[dict[str, object]]:
    """What each table was made into, in words."""
    return [
        {"table": name, "method": bag.method, "bytes": bag.plan.bytes, "plan": str(bag.plan)}
        for name, bag in tables.embedding_bags.items()
        if isinstance(bag, EmbeddingBag)
    ]
