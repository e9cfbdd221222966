"""Which ids get rows of their own, before anything was trained."""

from __future__ import annotations

import torch
from torch import Tensor

from embcompress.engine.hashing import mix64
from embcompress.importance import strongest, weakest
from embcompress.methods.base import TableSpec


def choose_kept_ids(
    table: TableSpec,
    size: int,
    padding_idx: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The most frequent ids; without counts those with the smallest keyed hash.

    With counts they are ordered by falling count (ties by id), so that the rows that are read
    most lie together; without, by id. The padding id, which needs no row, comes last.

    Returns:
        (size,) int64 distinct ids.
    """
    if table.counts is None:
        # A bijection of 64 bits, so no two ids tie. Signed order is as good as any.
        ids = torch.arange(table.num_embeddings, device=device)
        hashed = mix64(ids ^ _signed(table.key(1)))
        if padding_idx is not None:
            hashed[padding_idx] = torch.iinfo(hashed.dtype).max
        return weakest(hashed, size).sort().values
    if padding_idx is None:
        return strongest(table.counts.to(device), size)
    counts = table.counts.to(device).index_fill(0, torch.tensor(padding_idx, device=device), 0)
    ids = strongest(counts, min(size + 1, table.num_embeddings))
    return torch.cat([ids[ids != padding_idx], ids[ids == padding_idx]])[:size]


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value
