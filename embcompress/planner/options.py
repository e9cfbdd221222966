"""The ways to hold one table, and what each is expected to keep of the table's value."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embcompress.layouts.precision import buckets_for, tag_bits, ways_of
from embcompress.planner.loss import (
    FLOAT,
    NARROWNESS,
    QUANTIZATION_LOSS,
    SHARED_PROJECTION_LOSS,
    Head,
    TableValue,
)

FLOAT_BYTES = 4
_HOT_BITS = (4, 8)


@dataclass(frozen=True)
class Hot:
    """Columns of their own, beside the others or alone, for the ids that occur most.

    Attributes:
        ids: their number.
        buckets: of the slots in which they are found.
        columns, bits: of their rows.
        width: columns that a vector of theirs has altogether.
        share: of the table's value that is theirs.
        kept: share of the table's value that their bits leave.
    """

    ids: int
    buckets: int
    columns: int
    bits: int
    width: int
    share: float
    kept: float


@dataclass(frozen=True)
class Option:
    """One way to hold a table.

    Attributes:
        width: columns of its rows.
        rows: its rows; fewer than ids are shared by a hash, and none are for hot ids alone.
        parts: of a shared row, each found by a hash of its own.
        bits: of a number, or :data:`~embcompress.planner.loss.FLOAT`.
        shares: whether its projection is the one that tables share.
        bytes: of rows, steps, slots, and a projection of its own.
        kept: share of the table's value that bits, sharing and the projection leave; of the ids
            that are not hot.
        loss: expected share of the table's value, where all tables are as wide.
        hot: what frequent ids have beside it.
    """

    width: int
    rows: int
    parts: int
    bits: int
    shares: bool
    bytes: int
    kept: float
    loss: float
    hot: Hot | None = None


@dataclass(frozen=True)
class Choices:
    """What a table may be given.

    Attributes:
        share_projection: whether tables of one width may share a projection.
        narrowness: what one column of many loses (:data:`~embcompress.planner.loss.NARROWNESS`).
        hot: whether frequent ids may have columns of their own.
        few: whether they may be the only ones that have any.
        chunks: parts of a shared row, at most.
        widths: numbers of columns; None for all.
        bits: of a number; None for all.
        own_rows: every id has a row of its own.
        even: whether all tables have alike rows where hardly any are expected to be better
            (:mod:`embcompress.planner.even`).
    """

    share_projection: bool = True
    narrowness: float = NARROWNESS
    hot: bool = True
    few: bool = False
    chunks: int = 1
    widths: tuple[int, ...] | None = None
    bits: tuple[int, ...] | None = None
    own_rows: bool = False
    even: bool = False


def columns_kept(columns: int, dim: int, narrowness: float) -> float:
    """Share of a table's value that so many of its columns hold."""
    return 1 - narrowness * (1 / columns - 1 / dim)


def candidate_widths(dim: int, allowed: tuple[int, ...] | None = None) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, …: two to a doubling, up to ``dim``."""
    if allowed is not None:
        return sorted({min(width, dim) for width in allowed})
    doublings = [1 << power for power in range(dim.bit_length())]
    widths = {1, *doublings, *(3 * width // 2 for width in doublings)}
    return sorted({dim, *(width for width in widths if width < dim)})


@dataclass(frozen=True)
class HotRows:
    """Rows of frequent ids, which are found in slots.

    A code of every id would take more bytes: its bits are those of the number of hot ids, where a
    slot for each of these has those of how seldom they are.
    """

    head: Head
    columns: int
    bits: int

    def buckets(self, ids: int) -> int:
        """Of slots, in a table of so many ids."""
        return buckets_for(ids, self.head.ids)

    def bytes(self, ids: int) -> int:
        """Of slots, rows and steps."""
        buckets = self.buckets(ids)
        rows = buckets * ways_of(ids)
        keys = -(-rows * tag_bits(ids, buckets) // 8)
        return keys - (-rows * self.columns * self.bits // 8) + self.columns * FLOAT_BYTES


@dataclass(frozen=True)
class _Many:
    """Options of one width, as arrays."""

    hot: Sequence[HotRows | None]
    bits: NDArray[np.int64]
    rows: NDArray[np.int64]
    bytes: NDArray[np.int64]
    kept: NDArray[np.float64]
    hot_kept: NDArray[np.float64]
    loss: NDArray[np.float64]


@functools.lru_cache(maxsize=1 << 14)
def table_options(
    value: TableValue, width: int, dim: int, choices: Choices, *, shares: bool
) -> tuple[Option, ...]:
    """The options of a table at one width that none of fewer bytes and less loss beats.

    Args:
        value: of the table; how much it is worth makes no difference.
        width: columns of the rows.
        dim: ``embedding_dim`` of the table.
        choices: what it may be given.
        shares: whether its projection is the one that tables share.
    """
    if shares and width == dim:
        return ()
    parts = max(k for k in range(1, choices.chunks + 1) if width % k == 0)
    groups = list(_groups(value, width, dim, choices, shares, parts))
    sizes = np.concatenate([group.bytes for group in groups])
    losses = np.concatenate([group.loss for group in groups])
    starts = np.cumsum([0, *(len(group.bytes) for group in groups)])
    order = np.lexsort((losses, sizes))
    options = []
    for position in order[falling(losses[order])].tolist():
        number = int(np.searchsorted(starts, position, side="right")) - 1
        group, k = groups[number], position - int(starts[number])
        kept, hot_kept = float(group.kept[k]), float(group.hot_kept[k])
        rows, bits, hot = int(group.rows[k]), int(group.bits[k]), None
        has_own_rows = rows == value.rows[-1]
        if (own := group.hot[k]) is not None:
            whole = _hot_width(width if rows else 0, own.columns, dim, has_own_rows)
            hot = Hot(
                own.head.ids,
                own.buckets(value.rows[-1]),
                own.columns,
                own.bits,
                whole,
                own.head.share,
                hot_kept,
            )
        options.append(
            Option(
                width if rows else 0, rows, 1 if has_own_rows or not rows else parts, bits, shares,
                int(group.bytes[k]), kept, float(group.loss[k]), hot,
            )
        )  # fmt: skip
    return tuple(options)


def falling(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which losses are below all before them."""
    best = np.minimum.accumulate(losses)
    return np.concatenate([[True], best[1:] < best[:-1]])


def _groups(
    value: TableValue, width: int, dim: int, choices: Choices, shares: bool, parts: int
) -> Iterator[_Many]:
    numbers = np.array(choices.bits or tuple(QUANTIZATION_LOSS))
    first = len(value.rows) - 1 if choices.own_rows else 0
    bits = numbers.repeat(len(value.rows) - first)
    coarse = np.array([QUANTIZATION_LOSS[each] for each in numbers]).repeat(len(value.rows) - first)
    rows = np.tile(value.rows[first:], len(numbers))
    ids, is_own = value.rows[-1], rows == value.rows[-1]
    head = 0 if shares or width == dim else width * dim * FLOAT_BYTES
    steps = np.where(bits == FLOAT, 0, np.where(is_own, width, width // parts) * FLOAT_BYTES)
    sizes = -(-rows * width * bits // 8) + steps + head

    def narrow(columns: int) -> float:
        return columns_kept(columns, dim, choices.narrowness)

    def kept_of(own: tuple[float, ...]) -> NDArray[np.float64]:
        whole = 1 - shares * SHARED_PROJECTION_LOSS
        return np.asarray((1 - coarse) * np.tile(own[first:], len(numbers)) * whole)

    kept, none = kept_of(value.kept), np.zeros(len(bits))
    losses = 1 - kept * narrow(width)
    yield _Many([None] * len(bits), bits, rows, sizes, kept, none, losses)
    if shares or not choices.hot or choices.bits or choices.widths:
        return
    if choices.few and not choices.own_rows:
        yield _few(value, width, dim, choices.narrowness)
    if width == dim:
        return
    for each in value.heads[2::4]:
        kept = kept_of(each.kept)
        for columns in sorted({min(width, dim), min(3 * width, dim), dim}):
            own, alone = (narrow(_hot_width(width, columns, dim, has)) for has in (True, False))
            for hot_bits in _HOT_BITS:
                hot = HotRows(each, columns, hot_bits)
                extra = hot.bytes(ids) + columns * FLOAT_BYTES * dim
                loss = QUANTIZATION_LOSS[hot_bits]
                mixed = (width * coarse + columns * loss) / (width + columns)
                hot_kept = each.share * (1 - np.where(is_own, mixed, loss))
                left = kept * narrow(width) + hot_kept * np.where(is_own, own, alone)
                losses = 1 - left
                yield _Many([hot] * len(bits), bits, rows, sizes + extra, kept, hot_kept, losses)


def _few(value: TableValue, width: int, dim: int, narrowness: float) -> _Many:
    """Frequent ids have rows, and the others nothing at all: their vectors are zero."""
    ids = value.rows[-1]
    found = [
        HotRows(head, width, bits)
        for head in value.heads
        for bits in QUANTIZATION_LOSS
        if bits != FLOAT
    ]
    head = 0 if width == dim else width * dim * FLOAT_BYTES
    kept = np.array([each.head.share * (1 - QUANTIZATION_LOSS[each.bits]) for each in found])
    none = np.zeros(len(found), dtype=np.int64)
    return _Many(
        found,
        none,
        none,
        np.array([each.bytes(ids) + head for each in found], dtype=np.int64),
        none.astype(np.float64),
        kept,
        1 - kept * columns_kept(width, dim, narrowness),
    )


def _hot_width(width: int, columns: int, dim: int, has_own_row: bool) -> int:
    """Columns that tell a hot id apart; those that it shares with other ids do not."""
    return min(dim, columns + width * has_own_row)


def hull(options: list[Option]) -> list[Option]:
    """Options on the lower convex hull of loss over bytes, cheapest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda each: (each.bytes, each.loss)):
        if kept and option.loss >= kept[-1].loss - 1e-12:
            continue
        while len(kept) >= 2 and _is_above(kept[-2], kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _is_above(first: Option, middle: Option, last: Option) -> bool:
    """Whether the middle lies on or above the line from first to last."""
    return (middle.loss - first.loss) * (last.bytes - first.bytes) >= (last.loss - first.loss) * (
        middle.bytes - first.bytes
    )
