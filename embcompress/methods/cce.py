"""Clustered compositional embeddings."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.approximation.fitting import fit_stores, new_stores
from embcompress.clustering import cluster
from embcompress.engine.hashing import hash_bucket
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import LookupPlan
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.reclustering import CODES, ClusteredLayout, Reclustering

_CHUNK = 1 << 18  # ids
#: From this many bits of a code on, so many chunks: codes of few bits gain more from a bit.
_BITS_OF_CHUNKS = {4: 2, 5: 4, 7: 8}


@register
@dataclass(frozen=True)
class ClusteredCompositional(Method):
    """Clustered compositional embeddings, C_t[c_t(x)] + R_t[h_t(x)] in every chunk t of a vector.

    A vector is cut into chunks, each the sum of a clustered and a hashed row. Now and then in
    training, k-means of the ids' present chunks gives new clusters and codes, and the hashed rows
    start at zero again under new hashes, to learn what tells the ids of a cluster apart. So
    similar ids come to share memory, without a full table.

    Memory: n·c·b bits of codes with b = ⌊log₂ k⌋ + 1, and (k + r)·d numbers, for c chunks of
    k clusters and r hashed rows. The dial raises k and r together; where codes need another bit,
    r grows alone until the budget has room for that. While it trains, with a
    :class:`~embcompress.TrainingProcedure`, n numbers more: how often ids were seen.

    Source: Tsang, Ahle: "Clustering the sketch: dynamic compression for embedding tables",
    NeurIPS 2023, algorithm 3. What differs: hashes are recomputed instead of stored, and codes
    take the fewest bits; the first clusters are hashed, too; k-means looks at ids that were seen
    and weighs them by how often; it comes at doubling steps instead of after epochs; Adagrad's
    sums of a new cluster are the means of those of its ids' old ones.

    Attributes:
        chunks: c, a divisor of the width; None: 1 to 8, more for larger budgets.
        first: step of the first clustering; the next follow at 2, 4, 8 … times as many, so that
            hashed rows have as long to learn as all training before took.
        times: clusterings before the codes stay.
    """

    name: ClassVar[str] = "cce"
    renews_keys: ClassVar[bool] = True
    chunks: int | None = None
    first: int = 50
    times: int = 16

    def __post_init__(self) -> None:
        for name in ("chunks", "first"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.times < 0:
            raise ValueError(f"times must not be negative, got {self.times}")

    def _chunks(self, table: TableSpec, bits: int) -> int:
        """The chunks of codes of so many bits."""
        width = table.embedding_dim
        if self.chunks is not None:
            if width % self.chunks:
                raise ValueError(
                    f"chunks = {self.chunks} does not divide the table's width, {width}"
                )
            return self.chunks
        most = max((c for b, c in _BITS_OF_CHUNKS.items() if b <= bits), default=1)
        return max(c for c in range(1, most + 1) if width % c == 0)

    def _starts(self, table: TableSpec) -> list[int]:
        """The first size of codes of 1, 2, … bits, and the end of all sizes.

        Codes of b bits have 2^(b−1) to 2^b − 1 clusters, then so many rows more as the next bit
        takes.
        """
        n, starts = table.num_embeddings, [0]
        row = ClusteredLayout(n, table.embedding_dim, 1, 1, 1).plan([0], table.dtype).stores[1]
        for bits in range(1, n.bit_length() + 1):
            clusters = min(n, 2**bits - 1) - 2 ** (bits - 1) + 1
            now, after = (b * self._chunks(table, b) for b in (bits, bits + 1))
            gap = 0 if 2**bits > n else -(-n * (after - now) // (8 * row.bytes))
            starts.append(starts[-1] + clusters + gap)
        return starts

    def sizes(self, table: TableSpec) -> range:
        return range(self._starts(table)[-1])

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        starts = self._starts(table)
        bits = bisect_right(starts, size)
        rows = 2 ** (bits - 1) + size - starts[bits - 1]
        clusters = min(rows, 2**bits - 1, table.num_embeddings)
        chunks = self._chunks(table, bits)
        layout = ClusteredLayout(table.num_embeddings, table.embedding_dim, chunks, clusters, rows)
        return layout.plan([table.key(t) for t in range(chunks)], table.dtype)

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        """Hashed codes."""
        layout = ClusteredLayout.of(plan)
        keys = [table.key(layout.chunks + t) for t in range(layout.chunks)]
        for first in range(0, layout.num_embeddings, _CHUNK):
            ids = torch.arange(first, min(first + _CHUNK, layout.num_embeddings))
            columns = [hash_bucket(ids, key, layout.clusters) for key in keys]
            layout.write_codes(stores, first, torch.stack(columns, 1).to(stores[CODES].device))

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """K-means of every chunk, then clusters and hashed rows by least squares.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        layout, vectors = ClusteredLayout.of(plan), weight.detach().float().cpu()
        stores = new_stores(plan, table.seed)
        chunks = enumerate(vectors.chunk(layout.chunks, dim=1))
        codes = [cluster(c, layout.clusters, table.counts, table.seed + t)[1] for t, c in chunks]
        layout.write_codes(stores, 0, torch.stack(codes, dim=1))
        return fit_stores(plan, stores, weight.detach(), table.counts)

    def procedure(self) -> TableProcedure | None:
        return Reclustering(self) if self.times > 0 else None
