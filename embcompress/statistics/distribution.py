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
        queries: number of lookups altogether, known exactly.
    """

    counts: NDArray[np.float64]
    ids: NDArray[np.float64]
    queries: int

    @classmethod
    def exact(cls, counts: NDArray[np.int64]) -> CountDistribution:
        """From the counts of all ids, in any order; zeros are ids that were not seen."""
        values, ids = np.unique(counts[counts > 0], return_counts=True)
        values, ids = values[::-1], ids[::-1]
        return cls(values.astype(float), ids.astype(float), int((values * ids).sum()))

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
        # Not over the queries: where both sums are estimates, they err together.
        return float((taken * self.counts).sum() / (self.ids * self.counts).sum())

    def power_law(self) -> PowerLaw | None:
        """The fit of :func:`embcompress.statistics.power_law.fit_power_law`."""
        return fit_power_law(self.counts, self.ids)

    def curve(self, points: int = 2000) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ranks from 1, and the count at each, of about ``points`` ids evenly on a log axis."""
        if len(self.counts) == 0:
            return np.empty(0), np.empty(0)
        last = np.maximum.accumulate(np.maximum(np.rint(np.cumsum(self.ids)), 1))
        ranks = np.unique(np.rint(np.geomspace(1, last[-1], points)))
        return ranks, self.counts[np.searchsorted(last, ranks)]
