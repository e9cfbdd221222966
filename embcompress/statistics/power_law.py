"""How the counts of ids fall off: the exponent of a power law."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Fewer ids than this say nothing about a tail.
SMALLEST_TAIL = 50
#: Smaller counts are mostly chance: a Poisson count of mean 8 has a deviation of a third of it.
SMALLEST_COUNT = 8
_CANDIDATES = 30
_CHECKED_COUNTS = 1000
_RANGE = (1.05, 6.0)


@dataclass(frozen=True)
class PowerLaw:
    """A power law of counts and ranks.

    Attributes:
        exponent: a of count(rank) ∝ rank**-a.
        standard_error: of the exponent, from the number of ids alone.
        smallest_count: the law holds for ids of at least this count.
        ids: number of observed ids that it was fitted to.
        distance: Kolmogorov-Smirnov distance between the law and the ids; 0 is a perfect fit.
    """

    exponent: float
    standard_error: float
    smallest_count: int
    ids: int
    distance: float


def _zeta(exponents: Floats, starts: Floats) -> Floats:
    """Hurwitz zeta, the sum over k ≥ 0 of (start + k)**-exponent; arguments broadcast."""
    exponents, starts = np.broadcast_arrays(exponents, starts)
    return torch.special.zeta(
        torch.from_numpy(exponents.copy()), torch.from_numpy(starts.copy())
    ).numpy()


def fit_power_law(counts: NDArray[np.int64], ids: NDArray[np.int64]) -> PowerLaw | None:
    """Maximum-likelihood fit of the tail (Clauset, Shalizi and Newman, "Power-law distributions in
    empirical data", SIAM Review 2009, sections 3.1 and 3.3).

    Where counts fall off as rank**-a, the share of ids that occur c times falls off as
    c**-(1 + 1/a). That discrete power law is fitted above each of some 30 smallest counts, and
    the one closest to the ids is kept. It speaks of the ids that occur at least 8 times: where
    rarer ones are the rule, their counts follow chance more than the law.

    Args:
        counts: (n,) positive, distinct.
        ids: (n,) number of ids of each count.

    Returns:
        The law, or None: fewer than 50 ids occur that often, or none of the tails falls off
        with an exponent in (0.2, 20).
    """
    order = np.argsort(counts)
    values, numbers = counts[order].astype(np.float64), ids[order].astype(np.float64)
    tails = np.cumsum(numbers[::-1])[::-1]
    possible = np.flatnonzero((tails >= SMALLEST_TAIL) & (values >= SMALLEST_COUNT))
    if len(possible) == 0:
        return None
    places = np.geomspace(1, len(possible), _CANDIDATES).astype(int) - 1
    best: PowerLaw | None = None
    for place in np.unique(possible[places]).tolist():
        law = _fit_above(values[place:], numbers[place:])
        if law is not None and (best is None or law.distance < best.distance):
            best = law
    return best


def _fit_above(values: Floats, numbers: Floats) -> PowerLaw | None:
    """Fit to ids with counts ``values``, all of which belong to the tail; None at the limits."""
    total, start = numbers.sum(), values[:1]
    mean_log = float((numbers * np.log(values)).sum() / total)
    low, high = _RANGE
    for _ in range(4):  # the likelihood is concave; each grid is 50 times finer
        grid = np.linspace(low, high, 101)
        place = int(np.argmax(-np.log(_zeta(grid, start)) - grid * mean_log))
        low, high = grid[max(place - 1, 0)], grid[min(place + 1, 100)]
    exponent = grid[place : place + 1]
    if exponent[0] in _RANGE:
        return None
    checked = np.unique(
        np.geomspace(1, len(values), min(len(values), _CHECKED_COUNTS)).astype(int) - 1
    )
    observed = (np.cumsum(numbers) / total)[checked]
    expected = 1 - _zeta(exponent, values[checked] + 1) / _zeta(exponent, start)
    slope = 1 / (float(exponent[0]) - 1)
    return PowerLaw(
        exponent=slope,
        standard_error=slope / float(total) ** 0.5,
        smallest_count=int(start[0]),
        ids=round(total),
        distance=float(np.abs(observed - expected).max()),
    )
