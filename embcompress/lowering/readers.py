"""The two ends of a lowered lookup: ids become reads of TorchRec's tables, rows become vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embcompress.engine import Bags, check_ids
from embcompress.engine.hashing import mix64
from embcompress.engine.heads import apply_head
from embcompress.engine.quantization import fake_quantize, gradient_scale
from embcompress.engine.reference import place, pool_bags
from embcompress.engine.rows import address_rows
from embcompress.initialization import initialize_stores
from embcompress.lowering.tables import Read, Role
from embcompress.plan import (
    Address,
    Code,
    LookupPlan,
    Probe,
    Sign,
    Slot,
    Store,
    Weight,
)


@dataclass(frozen=True)
class Jagged:
    """What one feature of TorchRec's looks up.

    Attributes:
        rows: (N,) int64.
        lengths: (B,) int64, how many of them each bag has.
        weights: (N,) float, or None.
    """

    rows: Tensor
    lengths: Tensor
    weights: Tensor | None = None

    def total_weights(self) -> Tensor:
        """(B,) float32 sums of the bags' weights."""
        if self.weights is None:
            return self.lengths.float()
        bag = torch.repeat_interleave(self.lengths)
        return self.weights.new_zeros(len(self.lengths)).index_add(0, bag, self.weights).float()


class TableReader(nn.Module, ABC):
    """What a process holds itself of a lowered table: its plan, head, codes and shared scales.

    Everything here is small beside the rows, and is replicated: ``DistributedModelParallel``
    averages the gradients of its parameters. Subclasses say what is read and how it is combined.

    Args:
        plan: of the table.
        reads: what is read from TorchRec's tables, in order.
        replicated: the stores that are held here, and their tensors.
        std: standard deviation of the vectors that start values give.

    Attributes:
        plan, reads: as given.
    """

    def __init__(
        self,
        plan: LookupPlan,
        reads: Sequence[Read],
        replicated: dict[str, Tensor],
        std: float,
    ) -> None:
        super().__init__()
        self.plan, self.reads, self._std = plan, tuple(reads), std
        self._replicated = tuple(replicated)
        for name, tensor in replicated.items():
            if tensor.is_floating_point():
                self.register_parameter(name, _as_parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def replicated(self) -> dict[str, Tensor]:
        """The stores that are held here."""
        return {name: getattr(self, name) for name in self._replicated}

    def reset_parameters(self) -> None:
        """Draw what is held here anew, all but codes."""
        for name, tensor in self.replicated().items():
            if tensor.is_floating_point():
                draw_store(tensor, self.plan, name, self._std)

    @abstractmethod
    def requests(self, bags: Bags, weighted: bool) -> list[Jagged]:
        """What to look up for each read.

        Args:
            bags: of one feature, with all offsets.
            weighted: whether TorchRec's bags need weights.
        """

    @abstractmethod
    def assemble(self, bags: Bags, answers: Sequence[Tensor]) -> Tensor:
        """Pooled or single vectors from what was looked up for each read."""

    def _address(self, address: Address, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return address_rows(address, ids, self.plan, self.replicated())

    def _present(self, address: Address, ids: Tensor) -> Tensor | None:
        """(N,) where an address leads to a row; None: everywhere."""
        return self._address(address, ids)[1] if isinstance(address, Code | Slot) else None

    def _apply_head(self, vectors: Tensor) -> Tensor:
        return apply_head(self.plan, self.replicated(), vectors)

    def extra_repr(self) -> str:
        return str(self.plan)


class PooledReader(TableReader):
    """A table whose rows TorchRec sums over the bags."""

    def requests(self, bags: Bags, weighted: bool) -> list[Jagged]:
        ids = bags.ids.long()
        check_ids(ids, self.plan.num_embeddings)
        weights = bags.weights
        if weights is None and weighted:
            weights = torch.ones_like(ids, dtype=torch.float32)
        lengths = bags.offsets.diff().long()
        return [self._request(read, ids, lengths, weights) for read in self.reads]

    def _request(self, read: Read, ids: Tensor, lengths: Tensor, weights: Tensor | None) -> Jagged:
        """The rows of all probes of each id, one after another; without those that give zero."""
        count = len(read.probes)
        columns, factors, present = [], [], []
        for number in read.probes:
            probe = self.plan.probes[number]
            rows, is_present = self._address(probe.address, ids)
            columns.append(rows + probe.offset)
            present.append(is_present)
            if weights is not None:
                scale = probe.scale
                factors.append(
                    weights * hash_sign(ids, scale.key) if isinstance(scale, Sign) else weights
                )
        rows = torch.stack(columns, dim=1).reshape(-1)
        own = torch.stack(factors, dim=1).reshape(-1) if factors else None
        lengths = lengths * count
        kept = self._kept(ids, present)
        if kept is None:
            return Jagged(rows, lengths, own)
        bag = torch.repeat_interleave(lengths)
        kept_lengths = torch.zeros_like(lengths).index_add_(
            0, bag[kept], torch.ones_like(bag)[kept]
        )
        return Jagged(rows[kept], kept_lengths, None if own is None else own[kept])

    def _kept(self, ids: Tensor, present: Sequence[Tensor | None]) -> Tensor | None:
        """(N · probes,) which rows count; None for all."""
        counted = None if self.plan.padding_idx is None else ids != self.plan.padding_idx
        if counted is None and all(each is None for each in present):
            return None
        every = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted
        return torch.stack([every if p is None else every & p for p in present], 1).reshape(-1)

    def assemble(self, bags: Bags, answers: Sequence[Tensor]) -> Tensor:
        if self.plan.combine == "concat":
            pooled = torch.cat(list(answers), dim=1)
        else:
            reads = zip(self.reads, answers, strict=True)
            parts = [place(self.plan, read.probes[0], answer) for read, answer in reads]
            pooled = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        if self.plan.pool == "mean":
            pooled = pooled / self._counts(bags).clamp(min=1)[:, None]
        return self._apply_head(pooled)

    def _counts(self, bags: Bags) -> Tensor:
        """(B,) ids of each bag that count."""
        lengths = bags.offsets.diff().long()
        if self.plan.padding_idx is None:
            return lengths
        counted = (bags.ids != self.plan.padding_idx).long()
        return torch.zeros_like(lengths).index_add_(0, torch.repeat_interleave(lengths), counted)


class UnpooledReader(TableReader):
    """A table of which each id's rows are read, and combined here."""

    def requests(self, bags: Bags, weighted: bool) -> list[Jagged]:
        ids = bags.ids.long()
        check_ids(ids, self.plan.num_embeddings)
        lengths = bags.offsets.diff().long()
        return [Jagged(self._rows(read, ids), lengths) for read in self.reads]

    def _rows(self, read: Read, ids: Tensor) -> Tensor:
        probe = self.plan.probes[read.probes[0]]
        if read.role == "weight":
            assert isinstance(probe.scale, Weight)
            return self._address(probe.scale.address, ids)[0]
        return self._address(probe.address, ids)[0] + probe.offset

    def assemble(self, bags: Bags, answers: Sequence[Tensor]) -> Tensor:
        ids = bags.ids.long()
        by_probe = {
            (read.role, probe): answer
            for read, answer in zip(self.reads, answers, strict=True)
            for probe in read.probes
        }
        parts = [
            self._probe_vectors(probe, ids, *(by_probe.get((role, t)) for role in _ROLES))
            for t, probe in enumerate(self.plan.probes)
        ]
        if self.plan.combine == "concat":
            vectors = torch.cat(parts, dim=1)
        else:
            parts = [place(self.plan, t, part) for t, part in enumerate(parts)]
            vectors = parts[0]
            for part in parts[1:]:
                vectors = vectors + part if self.plan.combine == "sum" else vectors * part
        if self.plan.padding_idx is not None:
            vectors = torch.where((ids != self.plan.padding_idx)[:, None], vectors, 0)
        if self.plan.pool == "none":
            return self._apply_head(vectors)
        return self._apply_head(pool_bags(self.plan, vectors, bags))

    def _probe_vectors(
        self,
        probe: Probe,
        ids: Tensor,
        rows: Tensor | None,
        weight_rows: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """(N, width) vectors of one probe, zero where it is absent."""
        assert rows is not None
        vectors = self._dequantized(self.plan.store(probe.store), rows, scale, bias)
        present = self._present(probe.address, ids)
        if isinstance(probe.scale, Sign):
            vectors = vectors * hash_sign(ids, probe.scale.key)[:, None]
        elif isinstance(probe.scale, Weight):
            assert weight_rows is not None
            weight = weight_rows[:, probe.scale.column]
            has_weight = self._present(probe.scale.address, ids)
            weight = weight if has_weight is None else torch.where(has_weight, weight, 0)
            vectors = vectors * weight[:, None]
        return vectors if present is None else torch.where(present[:, None], vectors, 0)

    def _dequantized(
        self, store: Store, latents: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Latents as they will be once packed; the rows of other stores as they are."""
        names = store.quantization
        if names is None:
            return latents
        if scale is None:  # one for all rows
            scale = getattr(self, names.scale).float()
            bias = None if names.bias is None else getattr(self, names.bias).float()
        damping = gradient_scale(store, self.plan.store(names.scale))
        return fake_quantize(latents, scale, bias, store.bits, damping)


@torch.no_grad()
def draw_store(tensor: Tensor, plan: LookupPlan, store: str, std: float) -> Tensor:
    """Start values of one float store of a plan, which other processes or devices hold in part.

    Args:
        tensor: some rows of the store; columns beyond its width become zero.
        std: standard deviation that all stores together give the vectors.
    """
    if tensor.numel() == 0:  # a process without rows has a tensor without columns
        return tensor
    width = plan.store(store).width
    others = {each.name: torch.empty(1) for each in plan.stores}
    initialize_stores(plan, {**others, store: tensor[:, :width]}, std)
    tensor[:, width:] = 0
    return tensor


def hash_sign(ids: Tensor, key: int) -> Tensor:
    """(N,) float32 -1 or +1: elementwise :func:`embcompress.hashing.hash_sign`."""
    signed_key = int.from_bytes(key.to_bytes(8, "little"), "little", signed=True)
    return torch.where(mix64(ids ^ signed_key) < 0, -1.0, 1.0)


_ROLES: tuple[Role, ...] = ("rows", "weight", "scale", "bias")


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
