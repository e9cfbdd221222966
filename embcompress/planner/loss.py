"""What a table is worth to a model, and the share of it that narrow, coarse or shared rows keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from embcompress.methods.base import TableSpec

Array = NDArray[np.float64]

#: The name of uncompressed numbers among the bits.
FLOAT = 32
#: Share of the variance of normal numbers that a uniform quantizer loses, by bits (Max,
#: "Quantizing for minimum distortion", 1960, table II); for 4 bits, where training makes up for
#: nearly all of it, less.
QUANTIZATION_LOSS = {1: 0.3634, 2: 0.1188, 4: 0.002, 8: 0.0001, FLOAT: 0.0}
#: What w of d columns lose is NARROWNESS · (1/w - 1/d), in the unit of quantization losses. A
#: model that is trained with narrow rows loses much less than the variance they cannot hold. From
#: AUC on validation rows of MovieLens-100K (``benchmarks/planner.py constants``): with what 1 and 2
#: bits lose for the unit, 1, 2 and 4 columns of 16 say 0.045, 0.09 and 0.065. Other data may need
#: more: short trainings try that (:mod:`embcompress.planner.choosing`).
NARROWNESS = 0.075
#: What a table loses where its projection is other tables', too: their vectors lie in one space of
#: w dimensions, in the same directions. On validation rows of MovieLens-100K hardly more than the
#: noise for 2 and 4 columns (within 0.0013 of AUC, 0.01 in this unit), so this is a safe guess.
SHARED_PROJECTION_LOSS = 0.02
#: After so many examples half of what there is to know of an id is known.
_HALF_LEARNED = 4.0
#: Without counts, ids are taken to occur as often as 1 / (rank + 2)^1.05 says; so many ranks are
#: taken one by one.
_SINGLE_RANKS = 1 << 10
#: The most frequent ids that are looked at are fewer than 2 to this power.
_HEAD_DOUBLINGS = 17
#: Numbers of rows that are tried, for each halving.
_STEPS_A_HALVING = 4


@dataclass(frozen=True)
class Head:
    """The ids that occur most.

    Attributes:
        ids: their number.
        share: of the table's value that is theirs.
        kept: for each number of rows, the share of the table's value that the other ids keep of
            their own.
    """

    ids: int
    share: float
    kept: tuple[float, ...]


@dataclass(frozen=True)
class TableValue:
    """What is known of a table before anything is trained.

    Attributes:
        value: what its ids tell a model: in bits an example the entropy of the ids, each weighed
            by how much of it can be learned from its count, or what was measured.
        rows: numbers of rows that ids may share, rising; the last one is one a row each.
        kept: for each, the share of the value that is left where ids share rows by a hash.
        heads: the most frequent ids, 1, 2, 3, 5, 7, 11, 15, … of them, two numbers to a doubling;
            none where counts are not known.
    """

    value: float
    rows: tuple[int, ...]
    kept: tuple[float, ...]
    heads: tuple[Head, ...] = ()


#: A measured worth is not known better than to this share of the largest: what seems to tell
#: nothing may tell what another table tells, too.
_LEAST_WORTH = 0.01

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def table_values(
    tables: Sequence[TableSpec], worths: Mapping[str, float] | None = None
) -> tuple[TableValue, ...]:
    """The values of tables: entropies, or what was measured.

    Args:
        worths: by table name, what a model loses without the table, in any unit
            (:mod:`embcompress.planner.worth`); None where that is not known.

    Raises:
        ValueError: a table has no worth where others have.
    """
    values = tuple(table_value(table) for table in tables)
    if worths is None:
        return values
    missing = [table.name for table in tables if table.name not in worths]
    if missing:
        raise ValueError(f"worths has no table {missing[0]!r}; give one for every table, or none")
    least = _LEAST_WORTH * max(worths[table.name] for table in tables)
    return tuple(
        replace(value, value=max(least, worths[table.name]))
        for table, value in zip(tables, values, strict=True)
    )


def table_value(table: TableSpec) -> TableValue:
    """The value of a table: from its ids' counts, or from its cardinality alone.

    Ids that share a row by a hash get one vector, which is mostly that of the one that occurs
    most. The vector of an id with probability p, in one of R rows, is taken to be its own by the
    share p / (p + (1 - p)/R): its part of the expected occurrences of its row.
    """
    if table.counts is None:
        return _value(table.num_embeddings, *_assumed(table.num_embeddings), heads=[])
    if table.counts not in _KNOWN:
        counts, ids, learned = _counted(table.counts)
        heads = _head_sizes(int(ids.sum()))
        _KNOWN[table.counts] = _value(table.num_embeddings, counts, ids, learned, heads)
    known: TableValue = _KNOWN[table.counts]
    return known


def _counted(counts: Tensor) -> tuple[Array, Array, Array]:
    """Counts that occur, falling, how many ids have each, and what share of those is learned."""
    distinct, ids = np.unique(counts.double().cpu().numpy(), return_counts=True)
    distinct, ids = distinct[distinct > 0][::-1], ids[distinct > 0][::-1]
    return distinct, ids.astype(np.float64), distinct / (distinct + _HALF_LEARNED)


def _assumed(num_embeddings: int) -> tuple[Array, Array, Array]:
    """The same without counts; neighbours in the tail are taken together."""
    starts = np.arange(min(num_embeddings, _SINGLE_RANKS), dtype=np.float64)
    if num_embeddings > _SINGLE_RANKS:
        tail = np.geomspace(_SINGLE_RANKS, num_embeddings, _SINGLE_RANKS).round()
        starts = np.unique(np.concatenate([starts, tail]))[:-1]
    ids = np.diff(np.append(starts, num_embeddings))
    counts = 1 / (starts + (ids - 1) / 2 + 2) ** 1.05
    return counts, ids, np.ones_like(counts)


def _value(
    num_embeddings: int, counts: Array, ids: Array, learned: Array, heads: list[int]
) -> TableValue:
    """The value of ids by falling counts."""
    rows = _rows(num_embeddings)
    if len(counts) == 0:  # nothing was ever asked for
        return TableValue(0.0, rows, (0.0,) * (len(rows) - 1) + (1.0,))
    probability = counts / (counts * ids).sum()
    mass = probability * ids * learned
    share = mass / max(float(mass.sum()), 1e-300)
    ends = np.concatenate([[0.0], ids.cumsum()])
    kept = []  # for each number of rows, by all ids and by those behind each head
    for number in rows:
        own = np.ones_like(share) if number == num_embeddings else _own_share(probability, number)
        sums = np.concatenate([[0.0], (share * own).cumsum()])
        kept.append(sums[-1] - np.interp([0, *heads], ends, sums))
    by_head = np.array(kept).clip(min=0).T.tolist()
    return TableValue(
        value=float(-(mass * np.log2(probability)).sum()),
        rows=rows,
        kept=tuple(by_head[0]),
        heads=tuple(
            Head(size, 1 - left[-1], tuple(left))
            for size, left in zip(heads, by_head[1:], strict=True)
        ),
    )


def _own_share(probability: Array, rows: int) -> Array:
    """How much of its row's vector is an id's own."""
    if rows == 1:  # one row for all tells nothing apart
        return np.zeros_like(probability)
    return np.asarray(probability / (probability + (1 - probability) / rows))


def _head_sizes(num_ids: int) -> list[int]:
    """Two to a doubling, below the number of ids that occur."""
    sizes = [
        size for step in range(1, _HEAD_DOUBLINGS) for size in (2**step - 1, 3 * 2**step // 2 - 1)
    ]
    return [size for size in sizes if size < num_ids]


def _rows(num_embeddings: int) -> tuple[int, ...]:
    count, rows, step = num_embeddings, {1, num_embeddings}, 0
    while count > 1:
        step += 1
        count = int(num_embeddings * 2 ** (-step / _STEPS_A_HALVING))
        rows.add(max(1, count))
    return tuple(sorted(rows))
