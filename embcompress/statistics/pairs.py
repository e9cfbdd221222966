"""Which features occur together: mutual information on a sample of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embcompress.statistics.drift import entropy
from embcompress.statistics.hashes import Words, hash_buckets

_HOT = 48
_COLD = 16
_SHUFFLES = 2


class RowSample:
    """A uniform sample of rows: those whose numbers hash lowest.

    As for sampled ids, samples of parts of a log make that of the whole, as long as the parts
    number their rows differently.

    Attributes:
        words: (at most size,) uint64: the mixed row numbers.
        ids: (at most size, features) int64: the first id of each bag.
        present: the same shape, bool: whether the bag has an id.
    """

    def __init__(self, size: int, features: int) -> None:
        self.size = size
        self._largest = 0
        self.words: Words = np.empty(0, np.uint64)
        self.ids: NDArray[np.int64] = np.empty((0, features), np.int64)
        self.present: NDArray[np.bool_] = np.empty((0, features), bool)

    def wanted(self, words: Words) -> NDArray[np.int64]:
        """Positions of the rows that may enter the sample."""
        if len(self.words) == self.size:
            return np.flatnonzero(words < np.uint64(self._largest))
        if len(words) > self.size:
            return np.argsort(words, kind="stable")[: self.size]
        return np.arange(len(words))

    def add(self, words: Words, ids: NDArray[np.int64], present: NDArray[np.bool_]) -> None:
        """Add rows; see the attributes for the shapes."""
        if len(words) == 0:
            return
        room = self.size - len(self.words)
        if room:
            self.words = np.concatenate([self.words, words[:room]])
            self.ids = np.concatenate([self.ids, ids[:room]])
            self.present = np.concatenate([self.present, present[:room]])
            words, ids, present = words[room:], ids[room:], present[room:]
        if len(words):  # of all, the smallest stay; the others' places are taken
            order = np.argsort(np.concatenate([self.words, words]), kind="stable")
            enter = order[: self.size]
            enter = enter[enter >= self.size] - self.size
            leave = order[self.size :]
            leave = leave[leave < self.size]
            self.words[leave], self.ids[leave] = words[enter], ids[enter]
            self.present[leave] = present[enter]
        self._largest = int(self.words.max())

    def sort(self) -> None:
        """Put the rows into the order of their words, whatever order they came in."""
        if bool((self.words[1:] >= self.words[:-1]).all()):
            return
        order = np.argsort(self.words, kind="stable")
        self.restore(self.words[order], self.ids[order], self.present[order])

    def restore(self, words: Words, ids: NDArray[np.int64], present: NDArray[np.bool_]) -> None:
        """Take over a sorted sample."""
        self.words, self.ids, self.present = words, ids, present
        self._largest = int(words[-1]) if len(words) else 0

    def merge(self, other: RowSample) -> None:
        """Add another sample of the same hash and features."""
        self.add(other.words, other.ids, other.present)


@dataclass(frozen=True)
class Pair:
    """Two features and what they tell about each other.

    Attributes:
        first, second: names.
        bits: mutual information of the two, estimated from below.
        share: of the smaller of the two entropies: 1 means that one determines the other.
    """

    first: str
    second: str
    bits: float
    share: float


def related_pairs(names: list[str], sample: RowSample, key: int) -> list[Pair]:
    """Every pair of features with its mutual information, the closest first.

    Each feature is reduced to 65 values: its 48 most frequent ids in the sample, 16 hashed buckets
    of the others, and the empty bag. A function of an id cannot tell more than the id, so this is
    a lower bound but for chance; what chance alone gives is measured on shuffled rows and taken
    off.
    """
    columns = [
        _reduce(sample.ids[:, number], sample.present[:, number], key)
        for number in range(len(names))
    ]
    entropies = [entropy(np.bincount(column)) for column in columns]
    rng = np.random.default_rng(0)
    shuffles = [rng.permutation(len(sample.words)) for _ in range(_SHUFFLES)]
    shuffled = [[column[order] for order in shuffles] for column in columns]
    pairs = []
    for i, second in enumerate(names):
        for j, first in enumerate(names[:i]):
            least = min(entropies[i], entropies[j])
            if least == 0:
                pairs.append(Pair(first, second, 0.0, 0.0))
                continue
            by_chance = [_joint_entropy(columns[i], column) for column in shuffled[j]]
            bits = max(0.0, float(np.mean(by_chance)) - _joint_entropy(columns[i], columns[j]))
            pairs.append(Pair(first, second, bits, bits / least))
    return sorted(pairs, key=lambda pair: -pair.bits)


def _reduce(ids: NDArray[np.int64], present: NDArray[np.bool_], key: int) -> NDArray[np.int64]:
    """Values in [0, 65) for the ids of one feature."""
    values, places, counts = np.unique(ids, return_inverse=True, return_counts=True)
    hot = np.argsort(-counts, kind="stable")[:_HOT]
    reduced = _HOT + hash_buckets(values, key, _COLD)
    reduced[hot] = np.arange(len(hot))
    return np.where(present, reduced[places], _HOT + _COLD)


def _joint_entropy(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    return entropy(np.bincount(first * (_HOT + _COLD + 1) + second))
