"""Re-clustering of a table whose chunks are sums of a clustered and a hashed row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from embcompress.clustering import cluster, nearest
from embcompress.engine.rows import address_rows
from embcompress.hashing import mix64
from embcompress.importance import observe
from embcompress.layouts.packing import pack_codes, unpack_codes
from embcompress.plan import Code, Digit, Hash, LookupPlan, Probe, Store
from embcompress.procedures.base import Observes, RowState, TableProcedure, TrainedTable

CODES, COUNTS = "codes", "counts"
#: Vectors a cluster that k-means looks at (Tsang & Ahle, section 3).
_SAMPLE_PER_CLUSTER = 256
_CHUNK = 1 << 16  # ids; a multiple of 8, so that codes begin at a byte


def clusters(chunk: int) -> str:
    """Name of the store of a chunk's clusters."""
    return f"clusters_{chunk}"


def residuals(chunk: int) -> str:
    """Name of the store of a chunk's hashed rows."""
    return f"residuals_{chunk}"


@dataclass(frozen=True)
class ClusteredLayout:
    """Where the chunks of a vector are: chunk t is clusters_t[codes[x, t]] + residuals_t[h_t(x)].

    Attributes:
        num_embeddings, embedding_dim: of the table.
        chunks: of equal width.
        clusters: of a chunk.
        rows: hashed rows of a chunk.
    """

    num_embeddings: int
    embedding_dim: int
    chunks: int
    clusters: int
    rows: int

    @classmethod
    def of(cls, plan: LookupPlan) -> ClusteredLayout:
        """The layout of a plan that :meth:`plan` made."""
        chunks, first, second = plan.store(CODES).width, *plan.stores[1:3]
        return cls(plan.num_embeddings, plan.embedding_dim, chunks, first.rows, second.rows)

    @property
    def bits(self) -> int:
        """Bits of a code; the last code stands for "absent"."""
        return self.clusters.bit_length()

    def plan(self, keys: list[int], dtype: str) -> LookupPlan:
        """The plan without pooling; ``keys`` of the chunks' hashes."""
        n, width = self.num_embeddings, self.embedding_dim // self.chunks
        stores, probes = [Store(CODES, n, self.chunks, f"uint{self.bits}")], []
        for t, key in enumerate(keys):
            stores.append(Store(clusters(t), self.clusters, width, dtype))
            stores.append(Store(residuals(t), self.rows, width, dtype))
            code, column = Code(CODES, self.clusters, Digit(1, n), t), t * width
            probes.append(Probe(clusters(t), code, column=column))
            probes.append(Probe(residuals(t), Hash(key, self.rows), column=column))
        return LookupPlan(n, self.embedding_dim, tuple(stores), tuple(probes))

    def read_codes(self, stores: Mapping[str, Tensor], first: int, last: int) -> Tensor:
        """(last - first, chunks) codes of consecutive ids."""
        packed = stores[CODES]
        codes = unpack_codes(packed, first * self.chunks, last * self.chunks, self.bits)
        return codes.view(-1, self.chunks)

    def write_codes(self, stores: Mapping[str, Tensor], first: int, codes: Tensor) -> None:
        """Write the (N, chunks) codes of consecutive ids; ``first`` is a multiple of 8."""
        packed = pack_codes(codes.reshape(-1), self.bits)
        begin = first * self.chunks * self.bits // 8
        stores[CODES][begin : begin + len(packed)] = packed


class ReclusteringSettings(Protocol):
    """When clusters are computed anew; see :class:`embcompress.ClusteredCompositional`."""

    @property
    def first(self) -> int: ...
    @property
    def times(self) -> int: ...


class Reclustering(TableProcedure):
    """Replaces clusters by those of the present vectors, and starts the residuals anew.

    Its tensor: ``counts``, (num_embeddings,) float32, how often each id was seen: k-means looks
    at a sample of these ids, and weighs them so.
    """

    observes: Observes = "ids"
    averaged = (COUNTS,)

    def __init__(self, settings: ReclusteringSettings) -> None:
        self.settings = settings

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        device = table.stores()[CODES].device
        return {COUNTS: torch.zeros(table.plan.num_embeddings, device=device)}

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        observe(table.tensor(COUNTS), ids, amounts)

    def is_due(self, number: int) -> bool:
        turn, rest = divmod(number, self.settings.first)
        is_power_of_two = turn & (turn - 1) == 0
        return turn > 0 and rest == 0 and is_power_of_two and turn < 2**self.settings.times

    @torch.no_grad()
    def step(self, table: TrainedTable, number: int) -> None:
        plan, stores = table.plan, table.stores()
        layout = ClusteredLayout.of(plan)
        sample = self._sample(table, layout.clusters * _SAMPLE_PER_CLUSTER, number)
        counts = table.tensor(COUNTS)[sample]
        centers = []
        for t in range(layout.chunks):
            vectors = chunk_vectors(plan, stores, t, sample).cpu()
            if len(sample) == 0 or not bool(vectors.isfinite().all()):
                return  # nothing was seen, or the training diverged
            found, _ = cluster(vectors, layout.clusters, counts, seed=number + t)
            centers.append(found.to(stores[clusters(t)].device))
        self._assign(table, layout, centers)
        for t, found in enumerate(centers):
            stores[clusters(t)].copy_(found)
            stores[residuals(t)].zero_()
            for state in table.row_states(residuals(t)):
                state.tensor.fill_(state.fresh)
        table.take_keys(_with_new_hashes(plan))

    @staticmethod
    def _sample(table: TrainedTable, size: int, number: int) -> Tensor:
        """At most so many of the ids that were seen."""
        seen = table.tensor(COUNTS).nonzero().flatten()
        if len(seen) <= size:
            return seen
        generator = torch.Generator().manual_seed(number)
        chosen = torch.randint(len(seen), (size,), generator=generator).unique()
        return seen[chosen.to(seen.device)]

    @staticmethod
    def _assign(table: TrainedTable, layout: ClusteredLayout, centers: list[Tensor]) -> None:
        """Give every id its nearest clusters, and these the mean state of their ids' clusters."""
        plan, stores = table.plan, table.stores()
        means = [
            [_MeanState(state, layout.clusters) for state in table.row_states(clusters(t))]
            for t in range(layout.chunks)
        ]
        device = stores[CODES].device
        for first in range(0, layout.num_embeddings, _CHUNK):
            last = min(first + _CHUNK, layout.num_embeddings)
            ids = torch.arange(first, last, device=device)
            old = layout.read_codes(stores, first, last)
            new = torch.stack(
                [
                    nearest(chunk_vectors(plan, stores, t, ids), found)
                    for t, found in enumerate(centers)
                ],
                dim=1,
            )
            for t, states in enumerate(means):
                for state in states:
                    state.add(old[:, t], new[:, t])
            layout.write_codes(stores, first, new)
        for states in means:
            for state in states:
                state.write()


class _MeanState:
    """Optimizer state of new clusters: the mean of that of their ids' old ones."""

    def __init__(self, state: RowState, rows: int) -> None:
        self._state = state
        self._total = torch.zeros_like(state.tensor)
        self._members = torch.zeros(rows, dtype=torch.int64, device=state.tensor.device)

    def add(self, old: Tensor, new: Tensor) -> None:
        self._total.index_add_(0, new, self._state.tensor[old])
        self._members.index_add_(0, new, torch.ones_like(new))

    def write(self) -> None:
        shape = (-1, *[1] * (self._total.dim() - 1))
        members = self._members.view(shape)
        mean = self._total / members.clamp(min=1).to(self._total.dtype)
        self._state.tensor.copy_(torch.where(members > 0, mean, self._state.fresh))


def chunk_vectors(
    plan: LookupPlan, stores: Mapping[str, Tensor], chunk: int, ids: Tensor
) -> Tensor:
    """(N, width) float32 vectors of one chunk; an absent cluster counts as nothing."""
    total: Tensor | None = None
    for probe in plan.probes[2 * chunk : 2 * chunk + 2]:
        rows, present = address_rows(probe.address, ids, plan, stores)
        part = stores[probe.store][rows].float()
        part = part if present is None else torch.where(present[:, None], part, 0)
        total = part if total is None else total + part
    assert total is not None
    return total


def _with_new_hashes(plan: LookupPlan) -> LookupPlan:
    """The plan with the next key of each hash: a chain that the first key fixes."""
    probes = [
        replace(probe, address=replace(probe.address, key=mix64(probe.address.key)))
        if isinstance(probe.address, Hash)
        else probe
        for probe in plan.probes
    ]
    return replace(plan, probes=tuple(probes))
