"""Counting the values of a field, and numbering them by falling count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcompress.hashing import MIX_MULTIPLIERS, MIX_SHIFTS, derive_key

#: Ids that mean something in every field.
UNKNOWN_ID, MISSING_ID, FIRST_ID = 0, 1, 2
_MERGE_AT = 1 << 16
_LARGEST_COUNT = 2**32 - 1


class ValueCounter:
    """Counts values in 4 bytes, and those of a value itself, for every distinct one.

    Counts stop at 2**32 - 1. Below 2**33 rows at most one value of a field gets there, so the
    order by count is right all the same.

    Args:
        dtype: of the values, an unsigned integer.
    """

    def __init__(self, dtype: Any = np.uint64) -> None:
        self._values = np.empty(0, dtype)
        self._counts = np.empty(0, np.uint32)
        self._pending: list[tuple[NDArray[Any], NDArray[np.uint32]]] = []
        self._pending_size = 0

    def add(self, values: NDArray[Any]) -> None:
        """Count every value of a block."""
        distinct, counts = np.unique(values, return_counts=True)
        self._pending.append((distinct, counts.astype(np.uint32)))
        self._pending_size += len(distinct)
        # Merging goes over everything: wait until there is half as much new as old.
        if self._pending_size > max(_MERGE_AT, len(self._values) // 2):
            self._merge()

    def _merge(self) -> None:
        parts = [(self._values, self._counts), *self._pending]
        values = np.concatenate([values for values, _ in parts])
        counts = np.concatenate([counts for _, counts in parts])
        self._pending, self._pending_size = [], 0
        order = np.argsort(values, kind="stable")  # merges the parts, which are sorted
        values = values[order]
        first = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        totals = np.add.reduceat(counts[order], first, dtype=np.int64)
        self._values = values[first]
        self._counts = np.minimum(totals, _LARGEST_COUNT).astype(np.uint32)

    def result(self) -> tuple[NDArray[Any], NDArray[np.uint32]]:
        """Distinct values, rising, and their counts."""
        if self._pending_size:
            self._merge()
        return self._values, self._counts

    def restore(self, values: NDArray[Any], counts: NDArray[np.uint32]) -> None:
        """Go on from an earlier :meth:`result`."""
        self._values, self._counts = values, counts
        self._pending, self._pending_size = [], 0


@dataclass(frozen=True)
class Vocabulary:
    """Numbers of the values of one field: 2, 3, … by falling count, ties by value.

    Attributes:
        sorted_values: the values, rising.
        sorted_ids: the id of each, int32 where that is enough.
    """

    sorted_values: NDArray[Any]
    sorted_ids: NDArray[np.signedinteger[Any]]

    @classmethod
    def from_counts(
        cls, values: NDArray[Any], counts: NDArray[np.uint32], *, min_count: int
    ) -> Vocabulary:
        """From rising distinct values and their counts."""
        if min_count > 1:
            kept = counts >= min_count
            values, counts = values[kept], counts[kept]
        order = np.argsort(_LARGEST_COUNT - counts, kind="stable")
        ids = np.empty(len(values), np.int32 if len(values) + FIRST_ID < 2**31 else np.int64)
        ids[order] = np.arange(FIRST_ID, len(values) + FIRST_ID)
        return cls(values, ids)

    def __len__(self) -> int:
        return FIRST_ID + len(self.sorted_values)

    def values_by_id(self) -> NDArray[Any]:
        """Value of id ``2 + i`` at position i."""
        values = np.empty_like(self.sorted_values)
        values[self.sorted_ids - FIRST_ID] = self.sorted_values
        return values

    def encode(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Ids of the values; :data:`UNKNOWN_ID` for those that have none."""
        if not len(self.sorted_values):
            return np.full(len(values), UNKNOWN_ID, np.int64)
        # Distinct and rising values are found much faster than the same ones as they come.
        distinct, inverse = np.unique(values, return_inverse=True)
        position = np.searchsorted(self.sorted_values, distinct)
        position[position == len(self.sorted_values)] = 0
        known = self.sorted_values[position] == distinct
        return np.where(known, self.sorted_ids[position], UNKNOWN_ID).astype(np.int64)[inverse]


def hashed_ids(values: NDArray[Any], field: str, size: int) -> NDArray[np.int64]:
    """Ids in ``[2, size)`` by the library's keyed hash, without a vocabulary.

    The high 32 bits of the mixed value are reduced, so ``size`` must be below 2**31.
    """
    mixed = values.astype(np.uint64) ^ np.uint64(derive_key(0, field, 0))
    for shift, multiplier in zip(MIX_SHIFTS, (*MIX_MULTIPLIERS, None), strict=True):
        mixed = mixed ^ (mixed >> np.uint64(shift))
        if multiplier is not None:
            mixed = mixed * np.uint64(multiplier)
    bucket = ((mixed >> np.uint64(32)) * np.uint64(size - FIRST_ID)) >> np.uint64(32)
    return bucket.astype(np.int64) + FIRST_ID
