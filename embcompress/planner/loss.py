"""What a table is worth to a model, and the share of it that narrow, coarse or shared rows keep."""

from __future__ import annotations

from dataclasses import dataclass

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
#: AUC on MovieLens-100K, where 1, 2 and 4 columns of 16 lost 0.012, 0.007 and 0.003, and 2 bits
#: and 1 bit, 0.018 and 0.062 more than 4. Other data may need more: see
#: :mod:`embcompress.planner.search`.
NARROWNESS = 0.075
#: What a table loses where its projection is other tables', too: their vectors lie in one space of
#: w dimensions, in the same directions. From AUC on MovieLens-100K, where it is 0.001 to 0.004 for
#: 1 to 8 columns in 4 bits, and on 80,000 rows of Criteo's, 0.001 to 0.003.
SHARED_PROJECTION_LOSS = 0.02
#: After so many examples half of what there is to know of an id is known.
_HALF_LEARNED = 4.0
#: Without counts, ids are taken to occur as often as 1 / (rank + 2)^1.05 says, up to this rank;
#: the others together have the rest.
_RANKS = 1 << 16
#: Shares of ids that rows are tried for, each √2 of the next.
_STEPS_A_HALVING = 2


@dataclass(frozen=True)
class TableValue:
    """What is known of a table before anything is trained.

    Attributes:
        value: what its ids tell a model, in bits an example: the entropy of the ids, each weighed
            by how much of it can be learned from its count.
        rows: numbers of rows that ids may share, rising; the last one is one a row each.
        kept: for each, the share of the value that is left where ids share rows by a hash.
    """

    value: float
    rows: tuple[int, ...]
    kept: tuple[float, ...]


_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def table_value(table: TableSpec) -> TableValue:
    """The value of a table: from its ids' counts, or from its cardinality alone.

    Ids that share a row by a hash get one vector, which is mostly that of the one that occurs
    most. The vector of an id with probability p, in one of R rows, is taken to be its own by the
    share p / (p + (1 - p)/R): its part of the expected occurrences of its row.
    """
    if table.counts is None:
        return _value(table.num_embeddings, *_assumed(table.num_embeddings))
    if table.counts not in _KNOWN:
        _KNOWN[table.counts] = _value(table.num_embeddings, *_counted(table.counts))
    known: TableValue = _KNOWN[table.counts]
    return known


def _counted(counts: Tensor) -> tuple[Array, Array, Array]:
    """Counts that occur, how many ids have each, and what share of those can be learned."""
    distinct, ids = np.unique(counts.double().cpu().numpy(), return_counts=True)
    distinct, ids = distinct[distinct > 0], ids[distinct > 0]
    return distinct, ids.astype(np.float64), distinct / (distinct + _HALF_LEARNED)


def _assumed(num_embeddings: int) -> tuple[Array, Array, Array]:
    ranks = np.arange(min(num_embeddings, _RANKS), dtype=np.float64)
    counts, ids = 1 / (ranks + 2) ** 1.05, np.ones_like(ranks)
    ids[-1] += num_embeddings - len(ranks)
    return counts, ids, np.ones_like(counts)


def _value(num_embeddings: int, counts: Array, ids: Array, learned: Array) -> TableValue:
    rows = _rows(num_embeddings)
    if len(counts) == 0:  # nothing was ever asked for
        return TableValue(0.0, rows, (0.0,) * (len(rows) - 1) + (1.0,))
    probability = counts / (counts * ids).sum()
    mass = probability * ids * learned
    value = float(-(mass * np.log2(probability)).sum())
    total = max(float(mass.sum()), 1e-300)
    kept = [
        float((mass * probability / (probability + (1 - probability) / each)).sum()) / total
        for each in rows[:-1]
    ]
    if rows[0] == 1 and len(rows) > 1:
        kept[0] = 0.0  # one row for all tells nothing apart
    return TableValue(value, rows, (*kept, 1.0))


def _rows(num_embeddings: int) -> tuple[int, ...]:
    count, rows, step = num_embeddings, {1, num_embeddings}, 0
    while count > 1:
        step += 1
        count = int(num_embeddings * 2 ** (-step / _STEPS_A_HALVING))
        rows.add(max(1, count))
    return tuple(sorted(rows))
