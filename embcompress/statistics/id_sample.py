"""A uniform sample of the distinct ids of a stream, each with its exact count."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embcompress.statistics.hashes import Words
from embcompress.statistics.heavy_hitters import find


class IdSample:
    """The ids of the k smallest mixed words: Gibbons, "Distinct sampling for highly-accurate
    answers to distinct values queries and event reports" (VLDB 2001), with k in place of levels.

    The k-th smallest word only ever falls. So an id that is in the sample at the end was in it
    since it first occurred, and its count is exact. Every set of k ids is equally likely, frequent
    or not: this is what the tail looks like, where the heavy hitters show the head. Samples of
    parts of a stream make, bit for bit, that of the whole.

    Attributes:
        words: (at most k,) uint64, ascending; a word stands for its id, one to one.
        counts: (at most k,) int64.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.words: Words = np.empty(0, np.uint64)
        self.counts: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def is_complete(self) -> bool:
        """Whether every id that occurred is in the sample."""
        return len(self.words) < self.size

    def add(self, words: Words, counts: NDArray[np.int64]) -> None:
        """Count the ids of these distinct words ``counts`` times more."""
        if not self.is_complete:
            near = words <= self.words[-1]
            words, counts = words[near], counts[near]
        places = find(self.words, words)
        found = places >= 0
        self.counts[places[found]] += counts[found]
        if not found.all():
            order = np.argsort(words[~found])
            words, counts = words[~found][order], counts[~found][order]
            places = np.searchsorted(self.words, words)
            self.words = np.insert(self.words, places, words)[: self.size]
            self.counts = np.insert(self.counts, places, counts)[: self.size]

    def merge(self, other: IdSample) -> None:
        """Add another sample of the same hash."""
        self.add(other.words, other.counts)
