"""Shared memory by similarity: rows addressed by hashes of what ids occur with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.co_occurrence import minhash
from embcompress.engine.hashing import hash_bucket
from embcompress.layouts.packing import pack_codes
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Address, Code, Digit, Hash, LookupPlan, Probe, Store

_CODES, _WEIGHT = "codes", "weight"
_MOST_BUCKETS = 2**32 - 1


@register
@dataclass(frozen=True)
class Lma(Method):
    """Semantically constrained memory, E[l₁(x)] ‖ … ‖ E[l_p(x)]: ids that are alike share rows.

    l is a locality-sensitive hash of what an id occurs with: a minhash of a sample of the other
    features' ids, hashed to the rows of one store. Two ids share each part of their vectors with
    the probability of their samples' Jaccard similarity (and by accident, as in ``hash``).
    Addresses cannot be computed from the id alone, so they are stored, as packed codes.

    It needs :attr:`TableConfig.co_occurrence <embcompress.TableConfig>`, see
    :class:`embcompress.approximation.co_occurrence.CoOccurrence`. A table without it has nothing to
    be alike in: its parts are read by plain keyed hashes of the id, without codes, and the plan
    says so.

    Memory: m·d/p numbers, and n·p codes of ⌈log2(m + 1)⌉ bits; samples of tokens that addresses
    could be computed from would take 64 bits each, which is more for any m.

    Source: Desai et al., "Semantically constrained memory allocation (SCMA) for embedding in
    efficient recommendation systems" (LMA), arXiv 2103.06124, 2021, section 4. What differs: the
    paper hashes every number of a vector on its own, here a part of d/p columns is the unit;
    tables have a store each.

    Attributes:
        parts: p, a divisor of the width. More parts make finer degrees of likeness, and more
            codes.
    """

    name: ClassVar[str] = "lma"
    uses_co_occurrence: ClassVar[bool] = True
    parts: int = 2

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"parts must be at least 1, got {self.parts}")

    def _parts(self, table: TableSpec) -> int:
        """The largest divisor of the width that is at most ``parts``."""
        width = table.embedding_dim
        return max(p for p in range(1, min(self.parts, width) + 1) if width % p == 0)

    def sizes(self, table: TableSpec) -> range:
        """Rows; more than there are parts of vectors can never be read."""
        most = min(table.num_embeddings * self._parts(table), _MOST_BUCKETS)
        return range(1, most + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        rows, width, parts = table.num_embeddings, table.embedding_dim, self._parts(table)
        stores = [Store(_WEIGHT, size, width // parts, table.dtype)]
        if table.co_occurrence is not None:
            stores.append(Store(_CODES, rows, parts, f"uint{size.bit_length()}"))
        probes = []
        for t in range(parts):
            address: Address = Hash(table.key(t), size)
            if table.co_occurrence is not None:
                address = Code(_CODES, size, Digit(1, rows), t)
            probes.append(Probe(_WEIGHT, address))
        return LookupPlan(rows, width, tuple(stores), tuple(probes), combine="concat")

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        if table.co_occurrence is None:
            return
        codes, rows = plan.store(_CODES), plan.store(_WEIGHT).rows
        samples = table.co_occurrence.cpu()
        columns = [
            hash_bucket(minhash(samples, table.key(t)), table.key(codes.width + t), rows)
            for t in range(codes.width)
        ]
        packed = pack_codes(torch.stack(columns, 1).reshape(-1), codes.bits)
        stores[_CODES].copy_(packed)
