"""How the popularity of ids changes over time, in fixed memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Level of the slices of rows at the start: 2**10 rows. Shorter ones would show only chance.
_ROW_LEVEL = 10


class TimeSlices:
    """Slices of the time axis whose number stays bounded.

    A moment is an integer: a time, or the row's number where there are no times. Slice s of level
    l holds the moments with ``moment >> l == s``. The level is the smallest that leaves at most
    ``most`` slices with a row in them; it depends on the set of moments alone, not on their order
    or on how they were cut into parts. ``most`` is 2 or more: 0 and -1 meet at no level.

    Attributes:
        keys: numbers of the slices that have rows, ascending.
        has_times: whether moments are times.
    """

    def __init__(self, most: int, has_times: bool) -> None:
        self.most, self.has_times = most, has_times
        self.level = 0 if has_times else _ROW_LEVEL
        self.keys: NDArray[np.int64] = np.empty(0, np.int64)

    def include(self, keys: NDArray[np.int64], level: int) -> NDArray[np.int64]:
        """Make room for further slices, given at a level of their own.

        Returns:
            The new place of each slice that there was before; several may share one.
        """
        before, before_level = self.keys, self.level
        self.level = max(self.level, level)
        keys = np.unique(
            np.concatenate([before >> (self.level - before_level), keys >> (self.level - level)])
        )
        while len(keys) > self.most:
            self.level += 1
            keys = np.unique(keys >> 1)
        self.keys = keys
        return np.searchsorted(keys, before >> (self.level - before_level))

    def places(self, moments: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place among ``keys`` of the slice of each moment, all of them included before."""
        return np.searchsorted(self.keys, moments >> self.level)


def regroup(
    histograms: NDArray[np.int64], places: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """Histograms of ``size`` slices: row i goes to row ``places[i]``, rows that meet are added."""
    if len(histograms) == size and np.array_equal(places, np.arange(size)):
        return histograms
    moved = np.zeros((size, *histograms.shape[1:]), np.int64)
    add_slices(moved, histograms, places)
    return moved


def add_slices(
    histograms: NDArray[np.int64], more: NDArray[np.int64], places: NDArray[np.int64]
) -> None:
    """Add row i of ``more`` to row ``places[i]``, in place; many times faster than ``add.at``."""
    for place, row in zip(places.tolist(), more, strict=True):
        histograms[place] += row


def jensen_shannon(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Jensen-Shannon divergence of two histograms, in bits: 0 for equal shares, 1 for disjoint.

    Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on Information
    Theory 1991. NaN where a histogram is empty.
    """
    if first.sum() == 0 or second.sum() == 0:
        return float("nan")
    p, q = first / first.sum(), second / second.sum()
    return entropy(p + q) - (entropy(p) + entropy(q)) / 2


def entropy(weights: NDArray[np.int64] | NDArray[np.float64]) -> float:
    """Entropy in bits of the distribution that is proportional to the weights; 0 for none."""
    positive = weights[weights > 0].astype(np.float64)
    total = float(positive.sum())
    if total == 0:
        return 0.0
    return float(np.log2(total) - (positive * np.log2(positive)).sum() / total)


def divergence(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Jensen-Shannon divergence of two slices beyond what chance puts between equal ones.

    Two finite samples of one distribution differ too, by much where ids are many. So each slice
    comes in two random halves of its rows. The divergence ``within``, between halves of the same
    slice, is what chance does; with ``across``, between halves of different slices, the result is

        (across - within) / (1 - within)

    which is 0 on average for slices of one distribution, 1 for slices without a common id, and
    the divergence in bits for long slices. The larger slice is thinned to the size of the smaller
    one first: chance does less to larger samples. Slightly negative values are noise.

    Args:
        first, second: (2, buckets) histograms of a slice's halves.

    Returns:
        At most 1; NaN where a half is empty, or where chance alone leaves nothing in common.
    """
    first, second = _thin(first, int(second.sum())), _thin(second, int(first.sum()))
    across = jensen_shannon(first[0], second[1]) + jensen_shannon(first[1], second[0])
    within = jensen_shannon(*first) + jensen_shannon(*second)
    return (across - within) / (2 - within) if within < 2 - 1e-9 else float("nan")


def _thin(histogram: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """A random part of a histogram, of about ``size``; all of it where that is not much less."""
    total = int(histogram.sum())
    if size >= 0.95 * total:
        return histogram
    return np.random.default_rng(0).binomial(histogram, size / total)
