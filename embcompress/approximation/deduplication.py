"""Near-equal blocks of numbers stored once: which of them, and what stands for them."""

from __future__ import annotations

import torch
from torch import Tensor

from embcompress.clustering import cluster

#: Blocks that are clustered at a time; more are divided by a locality-sensitive hash.
_MOST_AT_ONCE = 4096
#: Of the blocks that are divided, every part gets at least so many representatives.
_FEWEST_KEPT = 8
_HYPERPLANES = 16


def deduplicate(
    blocks: Tensor, kept: int, counts: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Representatives of blocks, and which of them stands for each.

    Up to 4096 blocks are clustered by k-means. More are put in the order of a locality-sensitive
    hash, the sides of 16 random hyperplanes through the medians on which a block lies, and cut into
    parts of equal size, so the work grows with the number of blocks and not with its square.

    Args:
        blocks: (n, w) float32, on the CPU.
        kept: how many representatives there are.
        counts: (n,) how much each block matters, or None for equal ones.
        seed: the same one gives the same result.

    Returns:
        (kept, w) float32 and (n,) int64. Where there are fewer distinct blocks, the other
        representatives are zero.
    """
    parts = min(-(-len(blocks) // _MOST_AT_ONCE), max(1, kept // _FEWEST_KEPT))
    order = _hashed_order(blocks, seed) if parts > 1 else torch.arange(len(blocks))
    representatives, codes, first = [], torch.empty(len(blocks), dtype=torch.int64), 0
    for number, members in enumerate(order.tensor_split(parts)):
        last = (number + 1) * kept // parts
        own = None if counts is None else counts[members]
        centers, nearest = cluster(blocks[members], last - first, own, seed + number)
        representatives.append(centers)
        codes[members] = nearest + first
        first = last
    return torch.cat(representatives), codes


def _hashed_order(blocks: Tensor, seed: int) -> Tensor:
    """The blocks' numbers, near blocks one after the other for the most part."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(blocks.shape[1], _HYPERPLANES, generator=generator)
    projections = blocks @ directions
    sides = projections > projections.median(0).values
    return (sides.long() << torch.arange(_HYPERPLANES)).sum(1).argsort(stable=True)
