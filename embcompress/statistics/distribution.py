"""How queries spread over ids: counts by rank, whether exact or estimated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embcompress.statistics.power_law import PowerLaw, fit_power_law


@dataclass(frozen=True)
class CountDistribution:
    """Counts of ids, without the ids.

    Attributes:
        counts: (n,) float64, positive, descending.
        ids: (n,) float64, how many ids have, or are estimated to have, that count.
        observed: (n,) int64, from how many ids that is known; equal to ``ids`` where exact.
        queries: number of lookups altogether, known exactly.
    """

    counts: NDArray[np.float64]
    ids: NDArray[np.float64]
    observed: NDArray[np.int64]
    queries: int

    @classmethod
    def exact(cls, counts: NDArray[np.int64]) -> CountDistribution:
        """From the counts of all ids, in any order; zeros are ids that were not seen."""
        values, ids = np.unique(counts[counts > 0], return_counts=True)
        values, ids = values[::-1], ids[::-1].astype(np.int64)
        return cls(
            values.astype(np.float64), ids.astype(np.float64), ids, int((values * ids).sum())
        )

    @property
    def seen(self) -> float:
        """Number of distinct ids."""
        return float(self.ids.sum())

    def top_mass(self, share: float) -> float:
        """Share of the queries that go to the most frequent ids.

        Args:
            share: of the ids that were seen, in (0, 1]; at least one id is taken.

        Returns:
            In [0, 1]; NaN where nothing was seen.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        if self.queries == 0:
            return float("nan")
        wanted = max(1.0, np.ceil(share * self.seen - 1e-9))
        before = np.concatenate([[0.0], np.cumsum(self.ids)[:-1]])
        taken = np.clip(wanted - before, 0, self.ids)
        return min(1.0, float((taken * self.counts).sum()) / self.queries)

    def power_law(self) -> PowerLaw | None:
        """The fit of :func:`embcompress.statistics.power_law.fit_power_law`."""
        values, place = np.unique(np.rint(self.counts).astype(np.int64), return_inverse=True)
        observed = np.bincount(place, weights=self.observed, minlength=len(values))
        return fit_power_law(values, observed.astype(np.int64))

    def curve(self, points: int = 2000) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ranks (from 1) and counts of at most about ``points`` ids, evenly on a log axis."""
        if len(self.counts) == 0:
            return np.empty(0), np.empty(0)
        last = np.maximum(np.cumsum(self.ids), 1.0)
        first = np.concatenate([[1.0], last[:-1] + 1])
        ranks = np.stack([np.minimum(first, last), last], axis=1).ravel()
        counts = np.repeat(self.counts, 2)
        wanted = np.geomspace(1, ranks[-1], points)
        kept = np.unique(np.minimum(np.searchsorted(ranks, wanted), len(ranks) - 1))
        return ranks[kept], counts[kept]
