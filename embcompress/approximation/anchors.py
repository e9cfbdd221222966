"""The anchors nearest to each id in the graph of what ids occur with."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcompress.approximation.co_occurrence import NOTHING, ranks
from embcompress.engine.hashing import hash_bucket

Integers: TypeAlias = NDArray[np.int64]
#: Nodes, anchors that they know, and at what distance: three columns of equal length.
_Known: TypeAlias = tuple[Integers, Integers, Integers]

_TOKENS = 8  # of an id's sample that are edges of the graph
_KEPT = 8  # anchors that a node tells its neighbours of, or as many as are asked for
_HOPS = 3
_BUCKETS = 1 << 62


def nearest_anchors(samples: Tensor, anchors: Tensor, count: int, key: int) -> Tensor:
    """For each id the numbers of its nearest anchors, by breadth-first search from the anchors.

    Ids and tokens are the nodes, an id and each token of its sample are joined. The distance of
    two ids is the number of tokens on the way, at most 3; an anchor has distance 0 from itself.
    Equal distances are ordered by a keyed hash of node and anchor. A node hands on the nearest 8
    anchors (``count``, if that is more), so that what is kept is bounded.

    Args:
        samples: (n, k) int64 tokens, see
            :class:`embcompress.approximation.co_occurrence.CoOccurrence`.
        anchors: (m,) int64 ids.
        count: anchors of an id, at least 1.
        key: of the hash.

    Returns:
        (n, count) int64 in ``[0, m)``. An id that reaches fewer anchors gets hashed ones instead.
    """
    table = samples[:, :_TOKENS].numpy()
    ids, columns = np.nonzero(table != NOTHING)
    _, marks = np.unique(table[ids, columns], return_inverse=True)
    marks = marks.astype(np.int64)
    most = max(_KEPT, count)
    known: _Known = (
        anchors.numpy(),
        np.arange(len(anchors), dtype=np.int64),
        np.zeros(len(anchors), np.int64),
    )
    for _ in range(_HOPS):
        told = _nearest(_spread(known, ids, marks, 0), most, key)
        heard = _spread(told, marks, ids, 1)
        both = [np.concatenate(parts) for parts in zip(known, heard, strict=True)]
        known = _nearest((both[0], both[1], both[2]), most, key)
    return _as_codes(known, len(samples), len(anchors), count, key)


def _spread(known: _Known, sources: Integers, targets: Integers, step: int) -> _Known:
    """What nodes hear over the edges from ``sources`` to ``targets``; ``known`` rises by node."""
    order = np.argsort(known[0], kind="stable")
    nodes, anchors, distances = (column[order] for column in known)
    first = np.searchsorted(nodes, sources)
    count = np.searchsorted(nodes, sources, side="right") - first
    edge = np.repeat(np.arange(len(sources)), count)
    place = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(edge))
    return targets[edge], anchors[place], distances[place] + step


def _nearest(known: _Known, most: int, key: int) -> _Known:
    """The nearest ``most`` anchors of every node, each once, ordered by node and nearness."""
    nodes, anchors, distances = known
    # Three keys in one integer: sorting is faster than np.lexsort of three columns.
    size, steps = int(anchors.max(initial=0)) + 1, _HOPS + 1
    packed = np.sort((nodes * size + anchors) * steps + distances)
    pairs = packed // steps
    new = np.ones(len(pairs), bool)
    new[1:] = pairs[1:] != pairs[:-1]
    distances = (packed % steps)[new]
    nodes, anchors = np.divmod(pairs[new], size)
    mixed = torch.from_numpy(nodes) * 0x9E3779B9 + torch.from_numpy(anchors)
    order = np.lexsort((hash_bucket(mixed, key, _BUCKETS).numpy(), nodes * steps + distances))
    nodes, anchors, distances = nodes[order], anchors[order], distances[order]
    kept = ranks(nodes) < most
    return nodes[kept], anchors[kept], distances[kept]


def _as_codes(known: _Known, rows: int, anchors: int, count: int, key: int) -> Tensor:
    every = torch.arange(rows)
    columns = [hash_bucket(every, (key + 1 + t) % 2**64, anchors) for t in range(count)]
    codes = torch.stack(columns, 1)
    nodes, found, _ = known
    place = ranks(nodes)
    kept = place < count
    codes[torch.from_numpy(nodes[kept]), torch.from_numpy(place[kept])] = torch.from_numpy(
        found[kept]
    )
    return codes
