"""Click logs that tests of statistics count, and what is equal in two profiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embcompress import Profile, ProfileSettings
from embcompress.statistics.files import _arrays

Ids = NDArray[np.int64]
SMALL = ProfileSettings(
    exact_ids=500, sketch_columns=2**10, heavy_hitters=64, sampled_ids=128, register_bits=10,
    slices=8, drift_buckets=2**8, sampled_rows=500,
)  # fmt: skip
SPEC = "synthetic:rows=3000,ids=600,features=3,drift=0"
SIZES = {"exact": 300, "sketched": 5000, "open": None, "bag": 40}


def zipf(rng: np.random.Generator, size: int, count: int, exponent: float = 1.1) -> Ids:
    shares = np.arange(1, size + 1) ** -exponent
    return rng.choice(size, count, p=shares / shares.sum()).astype(np.int64)


def make_batches(seed: int, rows: int, batches: int) -> list[dict[str, Any]]:
    """Batches of all kinds of features; those of "open" outgrow exact counting half way."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(batches):
        lengths = rng.integers(0, 4, rows)
        made.append(
            {
                "exact": zipf(rng, 300, rows).astype(np.int32),
                "sketched": torch.from_numpy(zipf(rng, 5000, rows)),
                "open": zipf(rng, 400, rows) - (1 << 40 if number >= batches / 2 else 0),
                "bag": (
                    torch.from_numpy(rng.integers(0, 40, lengths.sum())),
                    torch.from_numpy(np.cumsum(lengths) - lengths),
                ),
            }
        )
    return made


def run(batches: list[dict[str, Any]], first_row: int = 0, times: Ids | None = None) -> Profile:
    profile = Profile(SIZES, SMALL, has_times=times is not None)
    for batch in batches:
        rows = np.arange(first_row, first_row + len(batch["exact"]))
        part = None if times is None else times[rows]
        profile.update(batch, row_numbers=rows, times=part)
        first_row += len(rows)
    return profile


def assert_equal_states(first: Profile, second: Profile, *, heavy: bool) -> None:
    """Everything that is kept is equal; ``heavy``: the lists of heavy hitters too."""
    first.flush()
    second.flush()
    mine, its = _arrays(first), _arrays(second)
    assert set(mine) == set(its) and len(mine) > 10
    for name in mine:
        if heavy or ".heavy." not in name:
            np.testing.assert_array_equal(mine[name], its[name], err_msg=name)
    assert (first.rows, first.slices.level) == (second.rows, second.slices.level)
    for name in first.features:
        for attribute in ("queries", "largest_bag"):
            assert getattr(first[name], attribute) == getattr(second[name], attribute)
