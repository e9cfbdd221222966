"""Count-Min sketch: an upper bound of any id's count, in fixed memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embcompress.statistics.hashes import hash_buckets


class CountMin:
    """Cormode and Muthukrishnan, "An improved data stream summary: the Count-Min sketch and its
    applications", Journal of Algorithms 2005.

    For N additions in ``columns`` columns and d rows, the bound of an id is at least its count,
    and is above ``count + (e / columns) * N`` with probability at most ``exp(-d)`` (section 3,
    theorem 1). Updates are not conservative, so the table is a sum over the additions: tables of
    parts of a stream add up, bit for bit, to that of the whole.

    Args:
        keys: hash key of each row.
        columns: a power of two.
    """

    def __init__(self, keys: Sequence[int], columns: int) -> None:
        self.keys, self.columns = tuple(keys), columns
        self.table: NDArray[np.int64] = np.zeros((len(self.keys), columns), np.int64)

    @property
    def total(self) -> int:
        """N, the sum of everything added."""
        return int(self.table[0].sum())

    def add(self, ids: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Count each id ``counts`` times more."""
        for row, key in zip(self.table, self.keys, strict=True):
            np.add.at(row, hash_buckets(ids, key, self.columns), counts)

    def merge(self, other: CountMin) -> None:
        """Add another sketch of the same keys."""
        self.table += other.table

    def _cells(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows, ids) the counters that each id falls on."""
        return np.stack(
            [
                row[hash_buckets(ids, key, self.columns)]
                for row, key in zip(self.table, self.keys, strict=True)
            ]
        )

    def upper_bounds(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """(ids,) bounds that no count exceeds."""
        return self._cells(ids).min(axis=0)

    def estimates(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """(ids,) counts without the sketch's upward bias.

        Every counter is reduced by the mean of its row's other counters, and the median over the
        rows is kept between 0 and the upper bound (Deng and Rafiei, "New estimation algorithms
        for streaming data: Count-min can do more", 2007). Its noise is that of a Count Sketch:
        about ``sqrt(sum of squared counts / columns)`` for an id, which hides the rare ones.
        """
        cells = self._cells(ids)
        noise = (self.total - cells) / (self.columns - 1)
        return np.clip(np.median(cells - noise, axis=0), 0, cells.min(axis=0))
