"""Counting the values of a field, and numbering them by falling count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embcompress.hashing import MIX_MULTIPLIERS, MIX_SHIFTS, derive_key

#: Ids that mean something in every field.
UNKNOWN_ID, MISSING_ID, FIRST_ID = 0, 1, 2
_MERGE_AT = 1 << 20


class ValueCounter:
    """Counts 64-bit values in memory proportional to the number of distinct ones."""

    def __init__(self) -> None:
        self._values = np.empty(0, np.uint64)
        self._counts = np.empty(0, np.int64)
        self._pending: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
        self._pending_size = 0

    def add(self, values: NDArray[np.uint64]) -> None:
        """Count every value of a block."""
        self._add_counts(*np.unique(values, return_counts=True))

    def _add_counts(self, values: NDArray[np.uint64], counts: NDArray[np.int64]) -> None:
        self._pending.append((values, counts))
        self._pending_size += len(values)
        # Merging costs a sort of everything: wait until there is as much new as old.
        if self._pending_size > max(_MERGE_AT, len(self._values)):
            self._merge()

    def _merge(self) -> None:
        values = np.concatenate([self._values, *(values for values, _ in self._pending)])
        counts = np.concatenate([self._counts, *(counts for _, counts in self._pending)])
        self._pending, self._pending_size = [], 0
        self._values, group = np.unique(values, return_inverse=True)
        self._counts = np.zeros(len(self._values), np.int64)
        np.add.at(self._counts, group, counts)

    def result(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Distinct values, rising, and their counts."""
        if self._pending:
            self._merge()
        return self._values, self._counts

    def restore(self, values: NDArray[np.uint64], counts: NDArray[np.int64]) -> None:
        """Go on from an earlier :meth:`result`."""
        self._values, self._counts = values, counts
        self._pending, self._pending_size = [], 0


@dataclass(frozen=True)
class Vocabulary:
    """Numbers of the values of one field: 2, 3, … by falling count, ties by value.

    Attributes:
        sorted_values: the values, rising.
        sorted_ids: the id of each.
        values_by_id: value of id ``2 + i`` at position i.
    """

    sorted_values: NDArray[np.uint64]
    sorted_ids: NDArray[np.int64]
    values_by_id: NDArray[np.uint64]

    @classmethod
    def from_counts(
        cls, values: NDArray[np.uint64], counts: NDArray[np.int64], *, min_count: int
    ) -> Vocabulary:
        """From rising distinct values and their counts."""
        kept = counts >= min_count
        values, counts = values[kept], counts[kept]
        order = np.argsort(-counts, kind="stable")
        ids = np.empty(len(values), np.int64)
        ids[order] = np.arange(len(values)) + FIRST_ID
        return cls(values, ids, values[order])

    def __len__(self) -> int:
        return FIRST_ID + len(self.sorted_values)

    def encode(self, values: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Ids of the values; :data:`UNKNOWN_ID` for those that have none."""
        if not len(self.sorted_values):
            return np.full(len(values), UNKNOWN_ID, np.int64)
        position = np.searchsorted(self.sorted_values, values)
        position[position == len(self.sorted_values)] = 0
        known = self.sorted_values[position] == values
        return np.where(known, self.sorted_ids[position], UNKNOWN_ID)


def hashed_ids(values: NDArray[np.uint64], field: str, size: int) -> NDArray[np.int64]:
    """Ids in ``[2, size)`` by the library's keyed hash, without a vocabulary.

    The high 32 bits of the mixed value are reduced, so ``size`` must be below 2**31.
    """
    mixed = values ^ np.uint64(derive_key(0, field, 0))
    for shift, multiplier in zip(MIX_SHIFTS, (*MIX_MULTIPLIERS, None), strict=True):
        mixed = mixed ^ (mixed >> np.uint64(shift))
        if multiplier is not None:
            mixed = mixed * np.uint64(multiplier)
    bucket = ((mixed >> np.uint64(32)) * np.uint64(size - FIRST_ID)) >> np.uint64(32)
    return bucket.astype(np.int64) + FIRST_ID
