"""Every way to spend bytes on some tables that no other way beats, by expected loss."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embcompress.planner.loss import (
    FLOAT,
    QUANTIZATION_LOSS,
    TableValue,
    narrowness_kept,
    quantization_kept,
)

_SCALE_BYTES = _FLOAT_BYTES = 4


@dataclass(frozen=True)
class Option:
    """One way to hold a table.

    Attributes:
        width: columns of its rows.
        rows: its rows; fewer than ids are shared by a hash.
        bits: of a number, or :data:`~embcompress.planner.loss.FLOAT`.
        shares: whether its projection is the one that tables share.
        bytes: of rows, steps, and a projection of its own.
        loss: expected, in the unit of the table's value.
    """

    width: int
    rows: int
    bits: int
    shares: bool
    bytes: int
    loss: float


@dataclass(frozen=True)
class Frontier:
    """Points of rising bytes and falling expected loss.

    Attributes:
        bytes, loss: (points,) of all tables together.
        width: (points,) columns of the widest table's rows; the others' are in proportion.
        steps: (points,) how many of the width's steps are taken.
        chains: by width, the options of each table and the order in which they are stepped to.
    """

    bytes: NDArray[np.int64]
    loss: NDArray[np.float64]
    width: NDArray[np.int64]
    steps: NDArray[np.int64]
    chains: dict[int, Chain]

    def __len__(self) -> int:
        return len(self.bytes)

    def options(self, point: int) -> list[Option]:
        """Each table's option."""
        chain = self.chains[int(self.width[point])]
        taken = np.bincount(
            chain.tables[: int(self.steps[point])], minlength=len(chain.options)
        ).tolist()
        return [options[k] for options, k in zip(chain.options, taken, strict=True)]


@dataclass(frozen=True)
class Chain:
    """All tables at one width: from the cheapest option of each, step by step, best first."""

    options: list[list[Option]]
    tables: NDArray[np.int64]
    bytes: NDArray[np.int64]
    loss: NDArray[np.float64]


@functools.lru_cache(maxsize=16)
def frontier(
    values: tuple[TableValue, ...], dims: tuple[int, ...], share_projection: bool = True
) -> Frontier:
    """The frontier of some tables.

    Args:
        values: what each is worth.
        dims: ``embedding_dim`` of each.
        share_projection: whether tables of one ``embedding_dim`` have one projection.
    """
    chains = {w: _chain(values, dims, w, share_projection) for w in _widths(max(dims))}
    sizes = np.concatenate([chain.bytes for chain in chains.values()])
    losses = np.concatenate([chain.loss for chain in chains.values()])
    widths = np.concatenate([np.full(len(c.bytes), w) for w, c in chains.items()])
    steps = np.concatenate([np.arange(len(chain.bytes)) for chain in chains.values()])
    order = np.lexsort((losses, sizes))
    best = np.minimum.accumulate(losses[order])
    rising = np.concatenate([[True], best[1:] < best[:-1]])
    points = order[rising]
    return Frontier(sizes[points], losses[points], widths[points], steps[points], chains)


def _widths(widest: int) -> list[int]:
    """All widths up to 16, then sixteen to a doubling."""
    widths, width = [], 1
    while width < widest:
        widths.append(width)
        width += max(1, 1 << max(0, width.bit_length() - 5))
    return [*widths, widest]


def _chain(
    values: Sequence[TableValue], dims: Sequence[int], width: int, share_projection: bool
) -> Chain:
    widths = [-(-width * dim // max(dims)) for dim in dims]
    options = [
        _hull(_options(value, own, dim, share_projection))
        for value, own, dim in zip(values, widths, dims, strict=True)
    ]
    steps = [
        ((before.loss - after.loss) / (after.bytes - before.bytes), table, before, after)
        for table, each in enumerate(options)
        for before, after in itertools.pairwise(each)
    ]
    # The hull's steps gain less and less a byte, so this keeps the order of each table's own.
    steps.sort(key=lambda step: -step[0])
    shared = {(own, dim) for own, dim in zip(widths, dims, strict=True) if own < dim}
    heads = sum(own * dim * _FLOAT_BYTES for own, dim in shared) if share_projection else 0
    sizes = [heads + sum(each[0].bytes for each in options)]
    losses = [sum(each[0].loss for each in options)]
    sizes += [after.bytes - before.bytes for _, _, before, after in steps]
    losses += [after.loss - before.loss for _, _, before, after in steps]
    tables = np.array([table for _, table, _, _ in steps], dtype=np.int64)
    return Chain(options, tables, np.cumsum(sizes), np.cumsum(losses))


def _options(value: TableValue, width: int, dim: int, share_projection: bool) -> list[Option]:
    options = []
    for shares in (False, True) if share_projection and width < dim else (False,):
        narrow = narrowness_kept(width, dim, shares)
        head = 0 if shares or width == dim else width * dim * _FLOAT_BYTES
        for bits in QUANTIZATION_LOSS:
            scale = 0 if bits == FLOAT else _SCALE_BYTES * width
            for rows, alone in zip(value.rows, value.kept, strict=True):
                size = -(-rows * width * bits // 8) + scale + head
                loss = value.value * (1 - narrow * quantization_kept(bits) * alone)
                options.append(Option(width, rows, bits, shares, size, loss))
    return options


def _hull(options: list[Option]) -> list[Option]:
    """Options on the lower convex hull of loss over bytes, cheapest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda each: (each.bytes, each.loss)):
        if hull and option.loss >= hull[-1].loss - 1e-12:
            continue
        while len(hull) >= 2 and _is_above(hull[-2], hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _is_above(first: Option, middle: Option, last: Option) -> bool:
    """Whether the middle lies on or above the line from first to last."""
    return (middle.loss - first.loss) * (last.bytes - first.bytes) >= (last.loss - first.loss) * (
        middle.bytes - first.bytes
    )
