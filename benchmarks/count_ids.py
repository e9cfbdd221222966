"""Rows a second of ``embcompress.profile`` on 26 features of Criteo's sizes.

    python benchmarks/count_ids.py                     # five million rows, under a minute
    python benchmarks/count_ids.py --rows 45840617     # as many as Criteo Kaggle has

Ids are synthetic: drawn from a power law (exponent 1.05), fresh in every batch. Drawing them is
not timed. ``exact`` is the default; ``sketched`` sketches all features, whatever their size;
``distinct`` sketches random 64-bit ids, hardly any of which occurs twice: the worst case.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time

import numpy as np
from criteo import CRITEO_CARDINALITIES
from measure import warn_if_busy
from numpy.typing import NDArray

from embcompress import Profile, ProfileSettings

BATCH = 1 << 16
EXPONENT = 1.05
CASES = ("exact", "sketched", "distinct")


def draw(rng: np.random.Generator, case: str, size: int) -> NDArray[np.int64]:
    """One batch of ids of one feature."""
    if case == "distinct":
        return rng.integers(-(2**63), 2**63 - 1, BATCH)
    power = 1 - EXPONENT
    ranks = (1 + rng.random(BATCH) * ((size + 1) ** power - 1)) ** (1 / power)
    return np.minimum(ranks.astype(np.int64) - 1, size - 1)


def measure(case: str, rows: int) -> tuple[float, Profile]:
    """Seconds of the counting, and the profile."""
    sizes = {f"C{number}": size for number, size in enumerate(CRITEO_CARDINALITIES, 1)}
    settings = ProfileSettings(exact_ids=1) if case == "sketched" else ProfileSettings()
    profile = Profile(
        {name: None if case == "distinct" else sizes[name] for name in sizes}, settings
    )
    rng, seconds = np.random.default_rng(0), 0.0
    while profile.rows < rows:
        batch = {name: draw(rng, case, size) for name, size in sizes.items()}
        start = time.perf_counter()
        profile.update(batch)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    profile.flush()
    return seconds + time.perf_counter() - start, profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    options = parser.parse_args()
    warn_if_busy()
    print(f"{platform.processor() or platform.machine()}, one thread, numpy {np.__version__}")
    for case in options.cases:
        seconds, profile = measure(case, options.rows)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{case:9} {profile.rows:>11,} rows in {seconds:6.1f} s: "
            f"{profile.rows / seconds / 1e6:.2f} M rows/s; peak of the process {peak:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
