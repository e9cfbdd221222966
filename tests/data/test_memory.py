"""Memory of preparing a file in which nearly every value is another one, the worst there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.peak_memory import measure_peak

_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_MEASURE = """
import sys
from pathlib import Path
from embcompress.data import prepare_criteo
log = prepare_criteo([Path(sys.argv[1])], Path(sys.argv[2]), progress=False)
print(sum(feature.num_embeddings for feature in log.features))
"""


def write_distinct_criteo(path: Path, rows: int, chunk: int = 100_000) -> Path:
    """A Criteo file of random 32-bit values."""
    rng = np.random.default_rng(0)
    start = 2 + 13 * 2  # the categories begin after the label and 13 integers of one digit
    with path.open("wb") as stream:
        for begin in range(0, rows, chunk):
            count = min(chunk, rows - begin)
            text = np.full((count, start + 26 * 9), ord("\t"), np.uint8)
            text[:, 0:start:2] = ord("0") + rng.integers(0, 2, (count, 14))
            values = rng.integers(0, 2**32, (count, 26), np.uint64)
            for digit in range(8):
                nibble = (values >> np.uint64(28 - 4 * digit)) & np.uint64(15)
                text[:, start + digit :: 9] = _HEX[nibble]
            text[:, -1] = ord("\n")
            stream.write(text.tobytes())
    return path


def measure(tmp_path: Path, rows: int) -> tuple[int, int]:
    """Peak resident bytes, and ids, of a preparation in a process of its own."""
    source = write_distinct_criteo(tmp_path / "day", rows)
    peak, (ids,), _ = measure_peak(_MEASURE, str(source), str(tmp_path / "log"))
    return peak, int(ids)


def test_fifty_thousand_rows_stay_small(tmp_path: Path) -> None:
    peak, ids = measure(tmp_path, 50_000)
    assert ids > 25 * 50_000
    assert peak < 700e6, f"{peak:,} bytes"


@pytest.mark.slow
def test_two_million_rows_of_distinct_values_stay_under_a_gigabyte_and_a_half(
    tmp_path: Path,
) -> None:
    peak, ids = measure(tmp_path, 2_000_000)
    assert ids > 25 * 2_000_000
    assert peak < 1.5e9, f"{peak:,} bytes"
