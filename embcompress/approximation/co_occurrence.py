"""What ids occur with: for every id a bounded sample of the other features' ids, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcompress.engine.hashing import mix64
from embcompress.hashing import derive_key

#: Stands for "no more" in a sample.
NOTHING = -1
_POSITIVE = 2**63 - 1
#: Pairs that wait to be merged, at most: 16 MiB.
_MOST_PENDING = 1 << 20


def tokens(feature: str, ids: Tensor) -> Tensor:
    """(N,) int64 ≥ 0: hashes that stand for the ids of a feature, alike for all tables.

    Args:
        feature: its name; equal ids of two features have different tokens.
        ids: (N,) int64.
    """
    key = derive_key(0, feature, 0)
    return mix64(ids.long() ^ (key - ((key >> 63) << 64))) & _POSITIVE


class CoOccurrence:
    """For every id of one feature, the ``size`` smallest tokens of what it occurs with.

    Tokens are hashes, so the smallest of them are a uniform sample of the distinct ones, and the
    share that two ids' samples have in common estimates how alike their company is (bottom-k
    sketches: Cohen & Kaplan, "Summarizing data using bottom-k sketches", PODC 2007). Samples of
    parts of the data, one after the other, make that of the whole, in any order.

    Args:
        num_embeddings: ids are in ``[0, num_embeddings)``.
        size: tokens kept of an id, at least 1.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_embeddings: int, size: int = 16) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self._samples = np.full((num_embeddings, size), NOTHING, np.int64)
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._pending_pairs = 0

    def add(self, ids: Tensor, company: Tensor) -> None:
        """Take note of pairs.

        Args:
            ids: (N,) int64.
            company: (N,) int64 the token (:func:`tokens`) that each occurs with.
        """
        new_ids, values = ids.numpy(), company.numpy()
        # Of an id whose sample is full, most pairs are known not to be among the smallest.
        largest = self._samples[new_ids, -1]
        wanted = (largest == NOTHING) | (values < largest)
        self._pending.append((new_ids[wanted], values[wanted]))
        self._pending_pairs += int(wanted.sum())
        # Sorting many pairs at once spares sorting the samples of their ids again and again.
        if self._pending_pairs >= _MOST_PENDING:
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        ids, company = (np.concatenate(part) for part in zip(*self._pending, strict=True))
        self._pending, self._pending_pairs = [], 0
        size = self._samples.shape[1]
        touched = np.unique(ids)
        held = self._samples[touched]
        known = held != NOTHING
        every = np.concatenate([ids, np.repeat(touched, known.sum(1))])
        values = np.concatenate([company, held[known]])
        order = np.lexsort((values, every))
        every, values = every[order], values[order]
        new = np.ones(len(every), bool)
        new[1:] = (every[1:] != every[:-1]) | (values[1:] != values[:-1])
        every, values = every[new], values[new]
        place = ranks(every)
        kept = place < size
        self._samples[every[kept], place[kept]] = values[kept]

    def samples(self) -> Tensor:
        """(num_embeddings, size) int64 rising tokens, :data:`NOTHING` behind the last."""
        self._merge()
        return torch.from_numpy(self._samples.copy())


@dataclass(frozen=True)
class Occurrences:
    """Ids of one feature in a batch of examples.

    Attributes:
        feature: its name.
        ids: (N,) int64.
        rows: (N,) int64 the example that each is of, rising.
    """

    feature: str
    ids: Tensor
    rows: Tensor


def add_company(samples: Mapping[str, CoOccurrence], batch: Sequence[Occurrences]) -> None:
    """Take note of what ids occur with in a batch: the ids that *other* features have there.

    Args:
        samples: what to add to, by feature.
        batch: all features' ids.
    """
    marks = [tokens(each.feature, each.ids) for each in batch]
    for own in batch:
        if own.feature not in samples:
            continue
        for other, mark in zip(batch, marks, strict=True):
            if other.feature != own.feature:
                left, right = _same_row(own.rows, other.rows)
                samples[own.feature].add(own.ids[left], mark[right])


def _same_row(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of positions with the same row; rows rise on both sides."""
    first = torch.searchsorted(right, left)
    count = torch.searchsorted(right, left, right=True) - first
    which = torch.arange(len(left)).repeat_interleave(count)
    start = (count.cumsum(0) - count)[which]
    return which, first[which] + torch.arange(len(which)) - start


def ranks(sorted_values: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, … within every run of equal values."""
    count = len(sorted_values)
    starts = np.ones(count, bool)
    starts[1:] = sorted_values[1:] != sorted_values[:-1]
    first = np.maximum.accumulate(np.where(starts, np.arange(count), 0))
    return np.asarray(np.arange(count) - first)


def minhash(samples: Tensor, key: int) -> Tensor:
    """(n,) int64 the smallest keyed hash of each id's tokens; of an id without any, its own hash.

    Two ids have the same with the probability of their samples' Jaccard similarity.

    Source: Broder, "On the resemblance and containment of documents", 1997.
    """
    signed = key - ((key >> 63) << 64)
    hashes = mix64(samples ^ signed) & _POSITIVE
    least = torch.where(samples == NOTHING, _POSITIVE, hashes).amin(1)
    own = mix64(torch.arange(len(samples)) ^ signed) & _POSITIVE
    return torch.where((samples != NOTHING).any(1), least, own)
