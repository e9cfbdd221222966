"""Generated files in Avazu's format: three days of impressions, power-law texts, both labels."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,"
    "app_category,device_id,device_ip,device_model,device_type,device_conn_type,"
    "C14,C15,C16,C17,C18,C19,C20,C21"
)
FIRST_HOUR = datetime(2014, 10, 21)


def avazu_rows(rows: int, seed: int = 0, hours: int = 72) -> list[list[str]]:
    """The fields of rows, in time order."""
    rng = np.random.default_rng(seed)
    texts = HEADER.split(",")[3:]
    sizes = np.geomspace(3, max(4, rows // 2), len(texts)).astype(int)
    times = np.sort(rng.integers(0, hours, rows))
    lines = []
    for number in range(rows):
        moment = FIRST_HOUR + timedelta(hours=int(times[number]))
        fields = [str(10**18 + number), str(rng.integers(0, 2)), moment.strftime("%y%m%d%H")]
        for position, size in enumerate(sizes):
            rank = min(int(rng.pareto(0.7)), int(size) - 1)
            wide = position >= 2 and position < 11  # site_id to device_model
            value = (rank * 2654435761 + position * 97) % 2**32
            fields.append(f"{value:08x}" if wide else str(1000 + rank))
        lines.append(fields)
    return lines


def write_avazu(path: Path, lines: list[list[str]], header: str = HEADER) -> Path:
    """Write the rows with a header line."""
    path.write_text("\n".join([header, *(",".join(fields) for fields in lines)]) + "\n")
    return path
