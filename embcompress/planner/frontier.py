"""Every way to spend bytes on some tables that no other way beats, by expected loss."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from embcompress.methods.base import TableSpec
from embcompress.planner.loss import (
    FLOAT,
    NARROWNESS,
    QUANTIZATION_LOSS,
    SHARED_PROJECTION_LOSS,
    TableValue,
    table_value,
)

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Option:
    """One way to hold a table.

    Attributes:
        width: columns of its rows.
        rows: its rows; fewer than ids are shared by a hash.
        bits: of a number, or :data:`~embcompress.planner.loss.FLOAT`.
        shares: whether its projection is the one that tables share.
        bytes: of rows, steps, and a projection of its own.
        kept: share of the table's value that bits, sharing and the projection leave.
        loss: expected, in the unit of the table's value, where all tables are as wide.
    """

    width: int
    rows: int
    bits: int
    shares: bool
    bytes: int
    kept: float
    loss: float


@dataclass(frozen=True)
class Choices:
    """What a table may be given.

    Attributes:
        share_projection: whether tables of one width may share a projection.
        widths: numbers of columns; None for all.
        bits: of a number; None for all.
        own_rows: every id has a row of its own.
        narrowness: what one column of many loses (:data:`~embcompress.planner.loss.NARROWNESS`).
    """

    share_projection: bool = True
    narrowness: float = NARROWNESS
    widths: tuple[int, ...] | None = None
    bits: tuple[int, ...] | None = None
    own_rows: bool = False


@dataclass(frozen=True)
class Chain:
    """From the cheapest option of each table, step by step, best first.

    Attributes:
        options: of each table, cheapest first.
        tables: (steps,) which table each step is of.
        bytes, loss: (steps + 1,) of all tables together.
    """

    options: list[list[Option]]
    tables: NDArray[np.int64]
    bytes: NDArray[np.int64]
    loss: NDArray[np.float64]


@dataclass(frozen=True)
class Frontier:
    """Points of rising bytes and falling expected loss.

    Attributes:
        bytes, loss: (points,) of all tables together.
        chain, steps: (points,) the number of a chain, and how many of its steps are taken.
        chains: the chains.
    """

    bytes: NDArray[np.int64]
    loss: NDArray[np.float64]
    chain: NDArray[np.int64] = field(repr=False)
    steps: NDArray[np.int64] = field(repr=False)
    chains: list[Chain] = field(repr=False)

    def __len__(self) -> int:
        return len(self.bytes)

    def options(self, point: int) -> list[Option]:
        """Each table's option."""
        chain = self.chains[int(self.chain[point])]
        taken = np.bincount(
            chain.tables[: int(self.steps[point])], minlength=len(chain.options)
        ).tolist()
        return [options[k] for options, k in zip(chain.options, taken, strict=True)]

    def within(self, budget_bytes: int) -> int | None:
        """The last point of at most so many bytes; None if there is none."""
        fitting = int(np.searchsorted(self.bytes, budget_bytes, side="right"))
        return fitting - 1 if fitting else None


@functools.lru_cache(maxsize=64)
def frontier(values: tuple[TableValue, ...], dims: tuple[int, ...], choices: Choices) -> Frontier:
    """The frontier of tables of known value.

    For every number of columns there is a chain in which no table has more, and one in which they
    may also share a projection of that many.

    Args:
        values: what each is worth.
        dims: ``embedding_dim`` of each.
        choices: what they may be given.
    """
    chains = []
    fitting: list[list[Option]] = [[] for _ in values]  # of at most the chain's columns
    for width in _widths(max(dims), choices.widths):
        # Narrower tables have columns in proportion.
        widths = [-(-width * dim // max(dims)) for dim in dims]
        for options, value, own, dim in zip(fitting, values, widths, dims, strict=True):
            options += _options(value, own, dim, choices, shares=False)
        chains.append(_chain(values, dims, fitting, 0, choices.narrowness))
        # Tables of one width have one projection; a single table has nothing to share.
        heads = {(own, dim) for own, dim in zip(widths, dims, strict=True) if own < dim}
        if choices.share_projection and len(values) > 1 and heads:
            sharing = [
                [*options, *_options(value, own, dim, choices, shares=True)]
                for options, value, own, dim in zip(fitting, values, widths, dims, strict=True)
            ]
            size = sum(own * dim * _FLOAT_BYTES for own, dim in heads)
            chains.append(_chain(values, dims, sharing, size, choices.narrowness))
    return _lower_envelope(chains)


def tables_frontier(tables: Sequence[TableSpec], choices: Choices = Choices()) -> Frontier:
    """The frontier of some tables."""
    values = tuple(table_value(table) for table in tables)
    return frontier(values, tuple(table.embedding_dim for table in tables), choices)


def _widths(dim: int, allowed: tuple[int, ...] | None) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, …: two to a doubling."""
    if allowed is not None:
        return sorted({min(width, dim) for width in allowed})
    doublings = [1 << power for power in range(dim.bit_length())]
    widths = {1, *doublings, *(3 * width // 2 for width in doublings)}
    return sorted({dim, *(width for width in widths if width < dim)})


def _chain(
    values: Sequence[TableValue],
    dims: Sequence[int],
    offered: list[list[Option]],
    heads_bytes: int,
    narrowness: float,
) -> Chain:
    options = [_hull(each) for each in offered]
    steps = [
        ((before.loss - after.loss) / (after.bytes - before.bytes), table, before, after)
        for table, each in enumerate(options)
        for before, after in itertools.pairwise(each)
    ]
    # The hull's steps gain less and less a byte, so this keeps the order of each table's own.
    steps.sort(key=lambda step: -step[0])
    first = [each[0] for each in options]
    path = [(table, before, after) for _, table, before, after in steps]
    sizes = [heads_bytes + sum(option.bytes for option in first)]
    sizes += [after.bytes - before.bytes for _, before, after in path]
    tables = np.array([table for table, _, _ in path], dtype=np.int64)
    losses = _losses(values, dims, first, path, narrowness)
    return Chain(options, tables, np.cumsum(sizes), losses)


def _losses(
    values: Sequence[TableValue],
    dims: Sequence[int],
    first: list[Option],
    path: list[tuple[int, Option, Option]],
    narrowness: float,
) -> NDArray[np.float64]:
    """(steps + 1,) the expected loss of all tables along a path of options.

    In the product of two tables' vectors the columns of the wider one that the narrower one lacks
    are lost, so a table's columns count by how much its partners have them, too: partner j by the
    square of its value, because the pairs that tell most are those of the tables that tell most.
    """
    value = np.array([each.value for each in values])
    partner = value**2 / max(float((value**2).sum()), 1e-300)
    # The start is a step of each table from nothing.
    tables = np.array([*range(len(first)), *(table for table, _, _ in path)])
    after = np.array([(o.width, o.kept) for o in [*first, *(o for _, _, o in path)]])
    before = np.array([(0, 0.0)] * len(first) + [(o.width, o.kept) for _, o, _ in path])
    dim = np.array(dims)[tables, None]
    edges = np.unique([*after[:, 0], max(dims)])
    drops = narrowness * (1 / edges[:-1] - 1 / edges[1:])
    has_after, has_before = (
        (each[:, :1] > edges[:-1]) | (each[:, :1] == dim) for each in (after, before)
    )
    counted = dim > edges[:-1]
    worth = value[tables, None] * counted
    kept = (worth * (after[:, 1:] - before[:, 1:])).cumsum(0)
    wide = (worth * (after[:, 1:] * has_after - before[:, 1:] * has_before)).cumsum(0)
    partners = (partner[tables, None] * (has_after * 1.0 - has_before)).cumsum(0)
    coarse = value.sum() - (value[tables] * (after[:, 1] - before[:, 1])).cumsum()
    losses = coarse + (drops * (kept - partners * wide)).sum(1)
    return np.asarray(losses[len(first) - 1 :])


def _lower_envelope(chains: list[Chain]) -> Frontier:
    sizes = np.concatenate([chain.bytes for chain in chains])
    losses = np.concatenate([chain.loss for chain in chains])
    numbers = np.repeat(np.arange(len(chains)), [len(chain.bytes) for chain in chains])
    steps = np.concatenate([np.arange(len(chain.bytes)) for chain in chains])
    order = np.lexsort((losses, sizes))
    points = order[_falling(losses[order])]
    return Frontier(sizes[points], losses[points], numbers[points], steps[points], chains)


def _falling(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which losses are below all before them."""
    best = np.minimum.accumulate(losses)
    return np.concatenate([[True], best[1:] < best[:-1]])


def _options(
    value: TableValue, width: int, dim: int, choices: Choices, *, shares: bool
) -> list[Option]:
    """The options of a table at one width that none of fewer bytes and less loss beats."""
    if shares and width == dim:
        return []
    first = len(value.rows) - 1 if choices.own_rows else 0
    numbers = np.array(choices.bits or tuple(QUANTIZATION_LOSS))
    bits, count = (
        each.ravel()
        for each in np.meshgrid(numbers, np.arange(first, len(value.rows)), indexing="ij")
    )
    rows = np.array(value.rows)[count]
    head = 0 if shares or width == dim else width * dim * _FLOAT_BYTES
    steps = np.where(bits == FLOAT, 0, width * _FLOAT_BYTES)
    sizes = -(-rows * width * bits // 8) + steps + head
    coarse = np.array([QUANTIZATION_LOSS[each] for each in numbers]).repeat(
        len(rows) // len(numbers)
    )
    kept = (1 - coarse) * np.array(value.kept)[count] * (1 - shares * SHARED_PROJECTION_LOSS)
    narrow = choices.narrowness * (1 / width - 1 / dim)
    losses = value.value * (1 - kept * (1 - narrow))
    order = np.lexsort((losses, sizes))
    best = order[_falling(losses[order])]
    columns = (rows[best], bits[best], sizes[best], kept[best], losses[best])
    return [
        Option(width, int(r), int(b), shares, int(size), float(k), float(loss))
        for r, b, size, k, loss in zip(*columns, strict=True)
    ]


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
