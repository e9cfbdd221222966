"""What a profile knows about one feature."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from embcompress.hashing import derive_key
from embcompress.statistics.counter import Counter, ExactCounter, SketchCounter
from embcompress.statistics.distribution import CountDistribution
from embcompress.statistics.drift import divergence
from embcompress.statistics.hashes import hash_buckets
from embcompress.statistics.settings import ProfileSettings

#: Bins of the histogram of bag sizes: 0, 1, 2-3, 4-7, … below 2**63.
SIZE_BINS = 64
_DRIFT_PROBE = 2**16


class FeatureProfile:
    """Counts, bag sizes, tail and drift of one feature.

    Attributes:
        name: of the feature.
        num_embeddings: ids are in ``[0, num_embeddings)``; None where ids are any integers.
        queries: number of ids looked up, over all bags.
        bag_sizes: (64,) int64, number of empty bags, then of bags with ``2**(i - 1)`` to
            ``2**i - 1`` ids for i = 1, 2, …
        largest_bag: number of ids in the largest bag.
    """

    def __init__(self, name: str, num_embeddings: int | None, settings: ProfileSettings) -> None:
        self.name, self.num_embeddings = name, num_embeddings
        self.settings = settings
        self._key = partial(derive_key, settings.seed, name)
        self.queries, self.largest_bag = 0, 0
        self.bag_sizes: NDArray[np.int64] = np.zeros(SIZE_BINS, np.int64)
        exact = num_embeddings is None or num_embeddings <= settings.exact_ids
        self.counter: Counter = ExactCounter(num_embeddings) if exact else self._sketch()
        #: (slices there are, halves of their rows, buckets)
        self.histograms: NDArray[np.int64] = np.zeros((0, 2, self.drift_buckets), np.int64)

    def _sketch(self) -> SketchCounter:
        return SketchCounter(self.settings, self._key)

    # ------------------------------------------------------------------------------- filling

    def check(self, ids: NDArray[np.int64]) -> None:
        """Refuse ids outside the table.

        Raises:
            IndexError: naming the first of them.
        """
        if self.num_embeddings is None or len(ids) == 0:
            return
        if int(ids.min()) < 0 or int(ids.max()) >= self.num_embeddings:
            bad = ids[(ids < 0) | (ids >= self.num_embeddings)][0]
            raise IndexError(
                f"feature {self.name!r}: id {int(bad)} is outside [0, {self.num_embeddings}); map "
                "unknown ids to a reserved id first, or leave num_embeddings out to count any ids"
            )

    def add(
        self, ids: NDArray[np.int64], lengths: NDArray[np.int64] | None, halves: NDArray[np.int64]
    ) -> None:
        """Count the bags of some rows.

        Args:
            ids: (N,) checked ids of all bags.
            lengths: (B,) number of ids of each bag, or None: one each.
            halves: (B,) number of the half slice of each row: twice its place among the slices,
                plus 0 or 1.
        """
        self.queries += len(ids)
        self._add_sizes(lengths, len(halves))
        if len(ids) == 0:
            return
        self._count(ids)
        if lengths is not None:
            halves = np.repeat(halves, lengths)
        buckets = self.drift_buckets
        hashed = buckets != self.num_embeddings
        values = hash_buckets(ids, self._key(_DRIFT_PROBE), buckets) if hashed else ids
        np.add.at(self.histograms.reshape(-1), halves * buckets + values, 1)

    @property
    def drift_buckets(self) -> int:
        """Buckets of a slice's histogram: one an id where there are few ids."""
        most = self.settings.drift_buckets
        return most if self.num_embeddings is None else min(most, self.num_embeddings)

    def _add_sizes(self, lengths: NDArray[np.int64] | None, rows: int) -> None:
        if lengths is None:
            self.bag_sizes[1] += rows
            self.largest_bag = max(self.largest_bag, 1)
        elif rows:
            bins = np.frexp(lengths.astype(np.float64))[1]  # the bit length, exact below 2**53
            self.bag_sizes += np.bincount(bins, minlength=SIZE_BINS)
            self.largest_bag = max(self.largest_bag, int(lengths.max()))

    def _count(self, ids: NDArray[np.int64]) -> None:
        if isinstance(self.counter, ExactCounter) and self.num_embeddings is None:
            highest = int(ids.max())
            if int(ids.min()) < 0 or highest >= self.settings.exact_ids:
                self.use_sketch()
            else:
                self.counter.reserve(highest + 1)
        self.counter.add(ids)

    def use_sketch(self) -> None:
        """Go over from exact counts to sketches."""
        if isinstance(self.counter, ExactCounter):
            sketch = self._sketch()
            sketch.add_exact(self.counter)
            self.counter = sketch

    def merge(self, other: FeatureProfile) -> None:
        """Add the other's counts and bag sizes; histograms are the profile's to add."""
        self.queries += other.queries
        self.bag_sizes += other.bag_sizes
        self.largest_bag = max(self.largest_bag, other.largest_bag)
        if isinstance(self.counter, ExactCounter) and isinstance(other.counter, ExactCounter):
            self.counter.merge(other.counter)
            return
        self.use_sketch()
        assert isinstance(self.counter, SketchCounter)
        if isinstance(other.counter, ExactCounter):
            self.counter.add_exact(other.counter)
        else:
            self.counter.merge(other.counter)

    # ------------------------------------------------------------------------------- reading

    @property
    def is_exact(self) -> bool:
        """Whether counts are exact, not estimated."""
        return self.counter.is_exact

    def seen(self) -> float:
        """Number of distinct ids, estimated where counts are not exact."""
        return self.counter.seen()

    def distribution(self) -> CountDistribution:
        """Counts by rank."""
        return self.counter.distribution()

    def slice_drift(self) -> NDArray[np.float64]:
        """(number of slices - 1,) divergence between consecutive time slices.

        As of :func:`embcompress.statistics.drift.divergence`. Ids are first hashed to
        ``drift_buckets`` buckets (not where there are fewer ids), which can only lower it: a
        change among rare ids that share buckets is not seen.
        """
        pairs = zip(self.histograms[:-1], self.histograms[1:], strict=True)
        return np.array([divergence(first, second) for first, second in pairs])

    def drift(self) -> float:
        """Divergence between the earlier and the later half of the queries.

        Measured as in :meth:`slice_drift`, cut where two slices meet: about 0 where popularity
        stays, 1 where no bucket is in both. NaN with a single slice, or without queries.
        """
        histograms = self.histograms
        ends = np.cumsum(histograms.sum(axis=(1, 2)))[:-1]
        if len(ends) == 0 or self.queries == 0:
            return float("nan")
        cut = int(np.argmin(np.abs(ends - self.queries / 2))) + 1
        return divergence(histograms[:cut].sum(axis=0), histograms[cut:].sum(axis=0))
