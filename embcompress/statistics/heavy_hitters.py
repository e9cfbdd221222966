"""The most frequent ids of a stream, in fixed memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def find(keys: NDArray[np.generic], wanted: NDArray[np.generic]) -> NDArray[np.int64]:
    """Place of each wanted key among ascending keys, or -1."""
    if len(keys) == 0:
        return np.full(len(wanted), -1)
    places = np.searchsorted(keys, wanted)
    places[places == len(keys)] = 0
    places[keys[places] != wanted] = -1
    return places


class HeavyHitters:
    """Misra and Gries' k counters, filled in batches.

    A batch is added as its own list of exact counts and merged as in Agarwal et al., "Mergeable
    summaries" (PODS 2012, section 3.1): sum the counters, subtract the (k + 1)-th largest from all
    and drop what is not positive. Every such step takes that number from at least k + 1 counters,
    so a count is too low by at most

        error  <=  (N - sum of the counters) / (k + 1)

    after N additions, however they were cut into batches or merged: every id that occurs more
    than N / (k + 1) times is in the list. The lists themselves do depend on the cuts.

    Attributes:
        ids: (at most k,) int64, ascending.
        counts: (at most k,) int64, positive, never above the true counts.
        error: how far they can be below, the subtractions so far.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.ids: NDArray[np.int64] = np.empty(0, np.int64)
        self.counts: NDArray[np.int64] = np.empty(0, np.int64)
        self.error = 0

    def add(self, ids: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Count each of the distinct, ascending ids ``counts`` times more."""
        places = find(ids, self.ids)
        found = places >= 0
        self.counts[found] += counts[places[found]]
        is_new = np.ones(len(ids), bool)
        is_new[places[found]] = False
        self.ids = np.concatenate([self.ids, ids[is_new]])
        self.counts = np.concatenate([self.counts, counts[is_new]])
        self._trim()

    def merge(self, other: HeavyHitters) -> None:
        """Add another list; the errors add up too."""
        self.error += other.error
        self.add(other.ids, other.counts)

    def _trim(self) -> None:
        if len(self.ids) > self.size:
            place = len(self.counts) - self.size - 1
            excess = int(np.partition(self.counts, place)[place])
            self.error += excess
            kept = self.counts > excess
            self.ids, self.counts = self.ids[kept], self.counts[kept] - excess
        order = np.argsort(self.ids)
        self.ids, self.counts = self.ids[order], self.counts[order]
