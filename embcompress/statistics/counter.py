"""How often each id of one feature occurs: exactly while that is cheap, else by sketches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from embcompress.statistics.count_min import CountMin
from embcompress.statistics.distribution import CountDistribution
from embcompress.statistics.hashes import mixed_words
from embcompress.statistics.heavy_hitters import HeavyHitters, find
from embcompress.statistics.hyperloglog import HyperLogLog
from embcompress.statistics.id_sample import IdSample
from embcompress.statistics.settings import ProfileSettings

#: Ids that one step of a loop over all ids of a table handles.
_CHUNK = 1 << 20
_SMALLEST_TABLE = 1 << 10


class ExactCounter:
    """One int64 for each id in ``[0, size)``; the array grows where the size is not known.

    Args:
        num_embeddings: number of ids, or None.
    """

    is_exact = True

    def __init__(self, num_embeddings: int | None) -> None:
        self.table: NDArray[np.int64] = np.zeros(num_embeddings or 0, np.int64)

    def reserve(self, size: int) -> None:
        """Have room for ids below ``size``."""
        if size > len(self.table):
            room = max(size, 2 * len(self.table), _SMALLEST_TABLE)
            # Not np.resize: fresh pages that are never touched take no memory.
            table = np.zeros(room, np.int64)
            table[: len(self.table)] = self.table
            self.table = table

    def add(self, ids: NDArray[np.int64]) -> None:
        """Count ids in ``[0, size)``."""
        np.add.at(self.table, ids, 1)

    def merge(self, other: ExactCounter) -> None:
        """Add another counter."""
        self.reserve(len(other.table))
        self.table[: len(other.table)] += other.table

    def counts(self, start: int, stop: int) -> NDArray[np.float64]:
        """Counts of the ids in ``[start, stop)``."""
        counts = np.zeros(stop - start)
        known = self.table[start:stop]
        counts[: len(known)] = known
        return counts

    def distribution(self) -> CountDistribution:
        """Counts by rank."""
        return CountDistribution.exact(self.table)

    def seen(self) -> float:
        """Number of distinct ids."""
        return float(np.count_nonzero(self.table))


class SketchCounter:
    """Four sketches of ids that are any 64-bit integers.

    Args:
        settings: their sizes.
        key: hash key by the number of a probe, see :func:`embcompress.hashing.derive_key`.
    """

    is_exact = False

    def __init__(self, settings: ProfileSettings, key: Callable[[int], int]) -> None:
        self._word_key = key(0)
        row_keys = [key(probe) for probe in range(1, settings.sketch_rows + 1)]
        self.count_min = CountMin(row_keys, settings.sketch_columns)
        self.heavy = HeavyHitters(settings.heavy_hitters)
        self.sample = IdSample(settings.sampled_ids)
        self.distinct = HyperLogLog(settings.register_bits)

    def add(self, ids: NDArray[np.int64]) -> None:
        """Count ids."""
        self.add_counted(*np.unique(ids, return_counts=True))

    def add_counted(self, ids: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Count each of the distinct ids ``counts`` times more."""
        words = mixed_words(ids, self._word_key)
        self.distinct.add(words)
        self.sample.add(words, counts)
        self.count_min.add(ids, counts)
        self.heavy.add(ids, counts)

    def add_exact(self, counter: ExactCounter) -> None:
        """Take over what was counted exactly."""
        for start in range(0, len(counter.table), _CHUNK):
            part = counter.table[start : start + _CHUNK]
            ids = np.flatnonzero(part)
            self.add_counted(ids + start, part[ids])

    def merge(self, other: SketchCounter) -> None:
        """Add another counter of the same settings and keys."""
        self.count_min.merge(other.count_min)
        self.heavy.merge(other.heavy)
        self.sample.merge(other.sample)
        self.distinct.merge(other.distinct)

    def estimates(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Counts of ids, from the sketch and, for heavy hitters, held to their bounds."""
        places = find(self.heavy.ids, ids)
        known = places >= 0
        low = self.heavy.counts[places[known]]
        if self.heavy.error == 0:  # the list is complete, and exact
            estimates = np.zeros(len(ids))
            estimates[known] = low
            return estimates
        estimates = self.count_min.estimates(ids)
        estimates[known] = np.clip(estimates[known], low, low + self.heavy.error)
        # An id that is not in the list occurs no more often than the list can err.
        estimates[~known] = np.minimum(estimates[~known], self.heavy.error)
        return estimates

    def counts(self, start: int, stop: int) -> NDArray[np.float64]:
        """Estimated counts of the ids in ``[start, stop)``."""
        return self.estimates(np.arange(start, stop, dtype=np.int64))

    def seen(self) -> float:
        """Number of distinct ids; exact while the sample holds all of them."""
        if self.sample.is_complete:
            return float(len(self.sample.words))
        return max(self.distinct.estimate(), float(len(self.sample.words)))

    def distribution(self) -> CountDistribution:
        """Counts by rank: the heavy hitters, and for the others what the sampled ids stand for."""
        ids = self.heavy.ids[self.heavy.counts >= max(self.heavy.error, 1)]
        head = self.estimates(ids)
        rest = find(np.sort(mixed_words(ids, self._word_key)), self.sample.words) < 0
        tail = self.sample.counts[rest].astype(np.float64)
        stands_for = max(1.0, (self.seen() - len(ids)) / max(1, len(tail)))
        counts = np.concatenate([head, tail])
        weights = np.concatenate([np.ones(len(ids)), np.full(len(tail), stands_for)])
        order = np.argsort(-counts, kind="stable")
        return CountDistribution(counts[order], weights[order], self.count_min.total)


Counter = ExactCounter | SketchCounter
