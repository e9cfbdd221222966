"""How the counts of ids fall off with their rank: the exponent of a power law."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Fewer ids than this make no line.
SMALLEST_NUMBER = 20
#: Smaller counts are mostly chance: a Poisson count of mean 8 has a deviation of a third of it.
SMALLEST_COUNT = 8
_LARGEST_EXPONENT = 10.0
#: Terms of the normalizing sum that are added one by one.
_TERMS = 1000


@dataclass(frozen=True)
class PowerLaw:
    """A power law of shares by rank.

    Attributes:
        exponent: a of share(rank) ∝ rank**-a, ranks from 1.
        ids: number of ids that it was fitted to, those of count 8 and above.
        distance: largest difference between the law's and the ids' cumulated shares; 0 is a
            perfect fit, and above some 0.1 the counts follow no power law.
    """

    exponent: float
    ids: int
    distance: float


def fit_power_law(counts: Floats, ids: Floats) -> PowerLaw | None:
    """Maximum-likelihood fit of a Zipf law to the queries of the frequent ids.

    Every query is a draw of a rank in 1, …, R with probability rank**-a / H(a), where R is the
    number of ids that occur at least 8 times: the law that minimizes the Kullback-Leibler
    divergence from the observed shares. Ranks are those of the observed counts, so that counts of
    one size, which are really ties, appear to fall off a little. The tail fit of Clauset, Shalizi
    and Newman (SIAM Review 2009) is for the few most frequent ids of a heavy tail; click logs bend
    there, and tables are filled by the rest.

    Args:
        counts: (n,) descending.
        ids: (n,) number of ids of each count; may be estimated, so need not be whole.

    Returns:
        The law, or None for fewer than 20 ids that occur that often.
    """
    frequent = counts >= SMALLEST_COUNT
    counts, ids = counts[frequent], ids[frequent]
    ranks = np.cumsum(ids)
    if len(ranks) == 0 or ranks[-1] < SMALLEST_NUMBER:
        return None
    # The sum of log(rank) from one rank to the next run of equal counts.
    logs = np.diff(_log_factorial(np.concatenate([[0.0], ranks])))
    mass = float((counts * ids).sum())
    mean_log = float((counts * logs).sum()) / mass
    low, high = 0.0, _LARGEST_EXPONENT
    for _ in range(5):  # the likelihood is concave; each grid is 10 times finer
        grid = np.linspace(low, high, 21)
        sums = [harmonic(float(ranks[-1]), exponent) for exponent in grid.tolist()]
        place = int(np.argmax(-np.log(sums) - grid * mean_log))
        low, high = float(grid[max(place - 1, 0)]), float(grid[min(place + 1, 20)])
    exponent = float(grid[place])
    ends = np.unique(np.geomspace(1, len(ranks), _TERMS).astype(int) - 1)
    observed = (np.cumsum(counts * ids) / mass)[ends]
    expected = np.array([harmonic(float(rank), exponent) for rank in ranks[ends]])
    distance = float(np.abs(observed - expected / sums[place]).max())
    return PowerLaw(exponent, round(float(ranks[-1])), distance)


def _log_factorial(values: Floats) -> Floats:
    return torch.lgamma(torch.from_numpy(values + 1)).numpy()


def harmonic(last: float, exponent: float) -> float:
    """Sum of ``rank**-exponent`` over ranks from 1 to ``last``, which need not be whole.

    Terms beyond the first 1000 are an integral by the midpoint rule, off by less than
    ``exponent / 24 * 1000**-(exponent + 1)``.
    """
    terms = float((np.arange(1, min(_TERMS, int(last)) + 1) ** -exponent).sum())
    start, end = min(_TERMS, int(last)) + 0.5, last + 0.5
    power = 1 - exponent
    if end <= start:
        return terms
    if abs(power) < 1e-9:
        return terms + float(np.log(end / start))
    return terms + float(start**power * np.expm1(power * np.log(end / start)) / power)
