"""Plans in which all tables have alike rows: taken where no others are expected to be better."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from embcompress.methods.base import TableSpec
from embcompress.planner.frontier import Frontier, Search, expected_loss, frontier
from embcompress.planner.loss import FLOAT, QUANTIZATION_LOSS, TableValue, table_values
from embcompress.planner.options import FLOAT_BYTES, Choices, Option, columns_kept

#: Expected losses say nothing if they differ by less than both: a share of the tables' value (on
#: validation rows of MovieLens-100K, 0.01 is 0.0013 of AUC), and a share of the smaller one, whose
#: constants are not known better.
TIE, RELATIVE_TIE = 0.01, 0.15
#: Share of the bytes that an even plan must use.
_USED = 0.9
_ALL = Choices()


def tables_frontier(
    tables: Sequence[TableSpec],
    choices: Choices = _ALL,
    worths: Mapping[str, float] | None = None,
) -> Frontier:
    """The plans of some tables, by rising bytes.

    Args:
        tables: all that share the bytes.
        choices: what each may be given.
        worths: see :func:`embcompress.planner.loss.table_values`.
    """
    values = table_values(tables, worths)
    dims = tuple(table.embedding_dim for table in tables)
    return (frontier_or_even if choices.even else frontier)(values, dims, choices)


@functools.lru_cache(maxsize=64)
def frontier_or_even(
    values: tuple[TableValue, ...], dims: tuple[int, ...], choices: Choices
) -> Frontier:
    """The frontier, even plans in place of points that are expected to lose hardly less.

    Bytes rise from point to point; the expected loss falls but for less than :data:`TIE`.
    """
    best = frontier(values, dims, choices)
    even = even_plans(values, dims, choices.narrowness)
    whole = sum(value.value for value in values)
    taken: list[tuple[Frontier, int]] = []
    for point, (size, loss) in enumerate(zip(best.bytes, best.loss, strict=True)):
        other = even.within(int(size))
        is_alike = (
            other is not None
            and even.bytes[other] >= _USED * size
            and even.loss[other] <= loss + min(TIE * whole, RELATIVE_TIE * loss)
        )
        source, number = (even, other) if other is not None and is_alike else (best, point)
        if not taken or source.bytes[number] > taken[-1][0].bytes[taken[-1][1]]:
            taken.append((source, number))
    return Frontier(
        np.array([source.bytes[number] for source, number in taken]),
        np.array([source.loss[number] for source, number in taken]),
        [source.options(number) for source, number in taken],
    )


def even_plans(values: Sequence[TableValue], dims: Sequence[int], narrowness: float) -> Frontier:
    """The same columns and bits for the ids of all tables, as far as bytes allow.

    A dial goes through pairs of columns and bits in the order of a table's bytes. Between two pairs
    the smallest tables have the larger one. These are the plans of
    :class:`~embcompress.LowBit`, below the whole width.
    """
    options = [_dial(value, dim, narrowness) for value, dim in zip(values, dims, strict=True)]
    longest = max(map(len, options))
    dense = [value.rows[-1] * dim for value, dim in zip(values, dims, strict=True)]
    rank = np.argsort(np.argsort(dense, kind="stable"), kind="stable")
    position, ahead = np.divmod(np.arange((longest - 1) * len(dims) + 1)[:, None], len(dims))
    last = np.array([len(each) - 1 for each in options])
    taken = np.minimum(position + (rank < ahead), last)
    sizes = sum(
        np.array([option.bytes for option in each])[taken[:, table]]
        for table, each in enumerate(options)
    )
    search = Search(options, taken, np.asarray(sizes))
    loss = expected_loss(values, dims, search, narrowness)
    return Frontier(search.bytes, loss, [search.chosen(k) for k in range(len(taken))])


def _dial(value: TableValue, dim: int, narrowness: float) -> list[Option]:
    """A table's options, by rising bytes: narrow rows, and floats where they take no more."""
    pairs = [(1, 1), (1, 2), *((width, 4) for width in range(1, dim))]
    pairs += [(width, 8) for width in range(dim // 2 + 1, dim)]
    rows = value.rows[-1]
    floats = Option(dim, rows, 1, FLOAT, False, rows * dim * FLOAT_BYTES, 1.0, 0.0)
    options = [floats]
    for width, bits in pairs if dim > 1 else []:
        size = -(-rows * width * bits // 8) + (1 + dim) * width * FLOAT_BYTES
        kept = 1 - QUANTIZATION_LOSS[bits]
        loss = 1 - kept * columns_kept(width, dim, narrowness)
        if size < floats.bytes:
            options.append(Option(width, rows, 1, bits, False, size, kept, loss))
    return sorted(options, key=lambda option: option.bytes)
