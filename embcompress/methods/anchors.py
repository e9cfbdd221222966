"""Vectors from the nearest anchors in the graph of co-occurrence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.anchors import nearest_anchors
from embcompress.engine.hashing import hash_bucket
from embcompress.importance import strongest
from embcompress.layouts.packing import pack_codes
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Code, Digit, Linear, LookupPlan, Probe, Store

_CODES, _WEIGHT, _HEAD = "codes", "weight", "projection"


@register
@dataclass(frozen=True)
class Anchors(Method):
    """Anchors, P·(A[a₁(x)] ‖ … ‖ A[a_k(x)]): an id is read off its k nearest anchors.

    A few ids, the most frequent ones, are anchors and have rows; every other id has the numbers of
    the anchors nearest to it in the graph that joins ids to what they occur with
    (:func:`embcompress.approximation.anchors.nearest_anchors`). Their rows, of d/k columns, side by
    side, go through a linear encoder. Ids with the same anchors have the same vector.

    It needs :attr:`TableConfig.co_occurrence <embcompress.TableConfig>`, see
    :class:`embcompress.approximation.co_occurrence.CoOccurrence`; ids that reach no anchor in it,
    and all ids of a table without it, get k anchors by keyed hashes. Without counts the anchors are
    the ids with the smallest keyed hash.

    Memory: m·d/k numbers for m anchors, n·k codes of ⌈log2(m + 1)⌉ bits, and d² numbers.

    Source: Galkin et al., "NodePiece: compositional and parameter-efficient representations of
    large knowledge graphs", ICLR 2022 (arXiv 2106.12144), section 3. What differs: the encoder is
    linear (there an MLP or a transformer), and there are no relations and no embedding of the
    distances; anchors are the ids of the highest count, which is their degree.

    Attributes:
        nearest: k, anchors of an id.
    """

    name: ClassVar[str] = "anchors"
    uses_co_occurrence: ClassVar[bool] = True
    nearest: int = 2

    def __post_init__(self) -> None:
        if self.nearest < 1:
            raise ValueError(f"nearest must be at least 1, got {self.nearest}")

    def _nearest(self, table: TableSpec) -> int:
        """The largest divisor of the width that is at most ``nearest``."""
        width = table.embedding_dim
        return max(k for k in range(1, min(self.nearest, width) + 1) if width % k == 0)

    def sizes(self, table: TableSpec) -> range:
        """Numbers of anchors."""
        return range(1, min(table.num_embeddings, 2**32 - 1) + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        rows, width, nearest = table.num_embeddings, table.embedding_dim, self._nearest(table)
        stores = (
            Store(_WEIGHT, size, width // nearest, table.dtype),
            Store(_CODES, rows, nearest, f"uint{size.bit_length()}"),
            Store(_HEAD, width, width, table.dtype),
        )
        probes = tuple(
            Probe(_WEIGHT, Code(_CODES, size, Digit(1, rows), t)) for t in range(nearest)
        )
        return LookupPlan(rows, width, stores, probes, combine="concat", head=Linear(_HEAD))

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        codes, count = plan.store(_CODES), plan.store(_WEIGHT).rows
        samples = table.co_occurrence
        if samples is None:
            samples = torch.full((table.num_embeddings, 1), -1)
        found = nearest_anchors(
            samples.cpu(), self._choose(table, count), codes.width, table.key(1)
        )
        stores[_CODES].copy_(pack_codes(found.reshape(-1), codes.bits))

    @staticmethod
    def _choose(table: TableSpec, count: int) -> Tensor:
        """(count,) the ids that are anchors."""
        if table.counts is not None:
            return strongest(table.counts.cpu(), count)
        hashes = hash_bucket(torch.arange(table.num_embeddings), table.key(0), 1 << 62)
        return hashes.argsort(stable=True)[:count]
