"""Generated files in the Criteo format: power-law hex values, missing fields, both labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FIELDS = 26


def write_criteo(path: Path, rows: int, seed: int = 0, chunk: int = 50_000) -> Path:
    """Write ``rows`` rows; memory is bounded by the chunk."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(4, max(8, rows // 3), FIELDS).astype(int)
    with path.open("w") as stream:
        for start in range(0, rows, chunk):
            count = min(chunk, rows - start)
            columns = [rng.integers(0, 2, count).astype(str)]
            for _ in range(13):
                numbers = rng.integers(-2, 5000, count).astype(str)
                columns.append(np.where(rng.random(count) < 0.1, "", numbers))
            for field, size in enumerate(sizes):
                rank = np.minimum((rng.pareto(0.7, count)).astype(np.int64), size - 1)
                value = (rank * 2654435761 + field * 97) % 2**32
                texts = np.char.mod("%08x", value)
                columns.append(np.where(rng.random(count) < 0.03, "", texts))
            lines = columns[0]
            for column in columns[1:]:
                lines = np.char.add(np.char.add(lines, "\t"), column)
            stream.write("\n".join(lines) + "\n")
    return path
