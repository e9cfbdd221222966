"""HotSketch: which ids have the largest scores, in slots of a fixed number.

A bucketed SpaceSaving sketch. An id hashes to one bucket of ``width`` slots, each with an id and
its score. An id that has a slot adds to its score; another takes an empty slot, or that of the
smallest score, and adds to that score, so a score is never below the true sum of its id. The first
``kept`` slots of each bucket are the hot ids: they change by :func:`promote` alone.

Sources: Zhang et al., "CAFE: towards compact, adaptive, and fast embedding for large-scale
recommendation models", SIGMOD 2024, section 3; Metwally, Agrawal, El Abbadi: "Efficient computation
of frequent and top-k elements in data streams", ICDT 2005.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from embcompress.engine import ops
from embcompress.engine.hashing import hash_bucket

#: The id of an empty slot; its score is 0.
EMPTY = -1


def add(
    ids: Tensor, amounts: Tensor, slot_ids: Tensor, scores: Tensor, key: int, kept: int
) -> None:
    """Add amounts to the scores of distinct ids, one after another, in place.

    Args:
        ids: (N,) int64, distinct.
        amounts: (N,) float32, finite; ids of amount 0 are passed over.
        slot_ids: (buckets, width) int64.
        scores: (buckets, width) float32.
        key: unsigned 64-bit, of the hash that gives an id's bucket.
        kept: so many slots of each bucket are not taken over; less than width.
    """
    if _is_compiled(slot_ids.device.type):
        signed = key - (1 << 64) if key >> 63 else key
        torch.ops.embcompress.hot_sketch_add(ids, amounts, slot_ids, scores, signed, kept)
    else:
        add_reference(ids, amounts, slot_ids, scores, key, kept)


@cache
def _is_compiled(device: str) -> bool:
    return ops.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
        "embcompress::hot_sketch_add", device.upper()
    )


def add_reference(
    ids: Tensor, amounts: Tensor, slot_ids: Tensor, scores: Tensor, key: int, kept: int
) -> None:
    """:func:`add` in torch: the first id of every bucket at once, then the second, and so on."""
    ids, amounts = ids[amounts > 0], amounts[amounts > 0]
    buckets = hash_bucket(ids, key, slot_ids.shape[0])
    order = torch.sort(buckets, stable=True).indices
    ids, amounts, buckets = ids[order], amounts[order], buckets[order]
    turn = torch.arange(ids.numel(), device=ids.device) - torch.searchsorted(buckets, buckets)
    for number in range(int(turn.max()) + 1 if ids.numel() else 0):
        now = turn == number
        slots = _slots_for(ids[now], slot_ids[buckets[now]], scores[buckets[now]], kept)
        slot_ids[buckets[now], slots] = ids[now]
        scores[buckets[now], slots] += amounts[now]


def _slots_for(ids: Tensor, slot_ids: Tensor, scores: Tensor, kept: int) -> Tensor:
    """The slot of its bucket that each id adds to, from the rows of these buckets."""
    own = slot_ids == ids[:, None]
    # An empty slot comes before every score, and the first of equal ones before the others.
    order = scores.masked_fill(slot_ids == EMPTY, -torch.inf)
    order[:, :kept] = torch.inf
    first = torch.sort(order, dim=1, stable=True).indices[:, 0]
    return torch.where(own.any(1), own.long().argmax(1), first)


def promote(slot_ids: Tensor, scores: Tensor, kept: int, margin: float) -> Tensor:
    """Let strong candidates of each bucket change places with weak hot ids, in place.

    The strongest candidate is held against the weakest hot id until its score is not larger than
    ``margin`` times the other's. Empty slots come first.

    Returns:
        (P,) int64 rising: the hot slots, numbered ``bucket * kept + slot``, that have a new id.
    """
    before = slot_ids[:, :kept].clone()
    every = torch.arange(slot_ids.shape[0], device=slot_ids.device)
    for _ in range(kept):
        rank = scores.masked_fill(slot_ids == EMPTY, -1.0)
        weakest = torch.sort(rank[:, :kept], dim=1, stable=True).indices[:, 0]
        best = torch.sort(rank[:, kept:], dim=1, descending=True, stable=True).indices[:, 0] + kept
        low, high = rank[every, weakest], rank[every, best]
        passes = (high >= 0) & (high > torch.where(low < 0, low, low * margin))
        if not bool(passes.any()):
            break
        rows, hot, candidate = every[passes], weakest[passes], best[passes]
        for values in (slot_ids, scores):
            moved = values[rows, hot]
            values[rows, hot] = values[rows, candidate]
            values[rows, candidate] = moved
    return (slot_ids[:, :kept] != before).flatten().nonzero().flatten()
