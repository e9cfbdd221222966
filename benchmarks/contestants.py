"""What is compared: ours, torch's table, FBGEMM's, and each method composed from torch ops."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from measure import Batch
from torch import Tensor, nn

import embcompress as ec
from embcompress.budget import fit_plan, parse_budget
from embcompress.collection import full_plan
from embcompress.engine import Bags, ops
from embcompress.engine.reference import lookup_reference
from embcompress.methods import Method, TableSpec
from embcompress.plan import Code, LookupPlan, Weight

#: An odd multiplier for the hash of :class:`ComposedHash`.
_PRIME = 2_654_435_761


def has_fbgemm() -> bool:
    return importlib.util.find_spec("fbgemm_gpu") is not None


# ------------------------------------------------------------------------------------- full table


def full_weight(num_embeddings: int, embedding_dim: int) -> Tensor:
    """A table with every page written."""
    return torch.empty(num_embeddings, embedding_dim).uniform_(-0.05, 0.05)


def torch_full(weight: Tensor, *, sparse: bool = False) -> nn.EmbeddingBag:
    """torch.nn.EmbeddingBag around a weight."""
    rows, width = weight.shape
    return nn.EmbeddingBag(rows, width, mode="sum", sparse=sparse, _weight=weight)


def fbgemm_tables(
    shapes: Sequence[tuple[int, int]], learning_rate: float = 0.01
) -> tuple[nn.Module, list[Tensor]]:
    """FBGEMM's table-batched embedding on the CPU, with its fused row-wise Adagrad.

    Returns:
        The module, called with ids and offsets of int64, and views of its tables.
    """
    import fbgemm_gpu  # noqa: F401 (registers the operators)
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, width in shapes],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=learning_rate,
        eps=1e-8,
        device="cpu",
    )
    tables = module.split_embedding_weights()
    for table in tables:
        table.uniform_(-0.05, 0.05)
    return module, tables


# ------------------------------------------------------------------------------------ composition


class ComposedHash(nn.Module):
    """Feature hashing as written by hand: a product modulo the rows, cheaper than our hash."""

    def __init__(self, plan: LookupPlan, sparse: bool) -> None:
        super().__init__()
        (store,) = plan.stores
        self.rows = store.rows
        self.sparse = sparse
        self.weight = nn.Parameter(full_weight(store.rows, store.width))

    def forward(self, batch: Batch) -> Tensor:
        rows = (batch.ids * _PRIME) % self.rows
        return F.embedding_bag(rows, self.weight, batch.starts, mode="sum", sparse=self.sparse)


class ComposedQuotientRemainder(nn.Module):
    """Two lookups and a product; bags of several ids combine per id, then add up."""

    def __init__(self, plan: LookupPlan, sparse: bool) -> None:
        super().__init__()
        self.modulus = plan.stores[0].rows
        self.sparse = sparse
        self.tables = nn.ParameterList(full_weight(s.rows, s.width) for s in plan.stores)

    def forward(self, batch: Batch) -> Tensor:
        remainder, quotient = batch.ids % self.modulus, batch.ids // self.modulus
        pairs = list(zip((remainder, quotient), self.tables, strict=True))
        size = len(batch.starts)
        if len(batch.ids) == size:  # one id a bag: torch's bags are its fastest gather
            left, right = (
                F.embedding_bag(rows, table, batch.starts, mode="sum", sparse=self.sparse)
                for rows, table in pairs
            )
            return left * right
        left, right = (F.embedding(rows, table, sparse=self.sparse) for rows, table in pairs)
        return (left * right).view(size, -1, left.shape[1]).sum(1)


class ComposedLowDim(nn.Module):
    """Narrow bags and a projection."""

    def __init__(self, plan: LookupPlan, sparse: bool) -> None:
        super().__init__()
        table, projection = plan.stores
        self.sparse = sparse
        self.weight = nn.Parameter(full_weight(table.rows, table.width))
        self.projection = nn.Parameter(full_weight(projection.rows, projection.width))

    def forward(self, batch: Batch) -> Tensor:
        narrow = F.embedding_bag(
            batch.ids, self.weight, batch.starts, mode="sum", sparse=self.sparse
        )
        return F.linear(narrow, self.projection)


class ComposedPlan(nn.Module):
    """Any other method: its plan read by the library's own reference, torch ops throughout."""

    def __init__(self, plan: LookupPlan, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse
        self.table = ec.EmbeddingBag.from_plan(plan.with_pool("sum"))

    def forward(self, batch: Batch) -> Tensor:
        bags = Bags(batch.ids, batch.offsets)
        return lookup_reference(self.table.plan, self.table.stores(), bags, sparse=self.sparse)


_COMPOSED: dict[str, Callable[[LookupPlan, bool], nn.Module]] = {
    "hash": ComposedHash,
    "qr": ComposedQuotientRemainder,
    "low_dim": ComposedLowDim,
}


def composed(method: str, plan: LookupPlan, sparse: bool) -> nn.Module:
    """The method from torch ops, on stores of the plan's sizes."""
    return _COMPOSED.get(method, ComposedPlan)(plan, sparse)


# ------------------------------------------------------------------------------------------ ours


def default_methods() -> list[str]:
    return ["hash", "qr", "multihash", "low_dim"]


def engine_name() -> str:
    """What runs our plans here."""
    if ops.is_available():
        return "the compiled engine"
    return "the pure-torch reference (no C++ extension, or EMBCOMPRESS_ENGINE=reference)"


@dataclass(frozen=True)
class Compressed:
    """A method's table of ours and its composition."""

    method: str
    budget: str
    table: ec.EmbeddingBag
    composition: nn.Module


def parse_method(name: str) -> Method:
    """The method of a name; ``low_bit:4x4`` is one with ``width=4`` and ``bits=4``."""
    base, _, shape = name.partition(":")
    if not shape:
        return ec.resolve_method(base)
    width, bits = map(int, shape.split("x"))
    return replace(ec.resolve_method(base), width=width, bits=bits)


def compressed_tables(
    rows: int,
    width: int,
    methods: Sequence[str],
    budgets: Sequence[str],
    *,
    sparse: bool = False,
    deployed: bool = False,
    device: str = "cpu",
) -> list[Compressed]:
    """Every method at every budget that it can meet.

    Args:
        sparse: gradients of the composition.
        deployed: quantized stores are packed, as they are served.
    """
    found = []
    spec = TableSpec(rows, width)
    for budget in budgets:
        for method in methods:
            try:
                limit = parse_budget(budget, spec.dense_bytes)
                plan = fit_plan(parse_method(method), spec, limit).with_pool("sum")
            except ec.BudgetError as error:
                print(f"left out: {error}")
                continue
            name = method.partition(":")[0]
            table = ec.EmbeddingBag.from_plan(plan, name, deployed=deployed, device=device)
            with torch.device(device):
                composition = composed(method, plan, sparse)
            found.append(Compressed(method, budget, table, composition))
    return found


# ------------------------------------------------------------------------------------------ bytes


def bytes_touched(plan: LookupPlan, num_ids: int, batch_size: int) -> float:
    """Bytes that a forward lookup must read and write, each row counted every time it is read.

    Ids and offsets (8 bytes each), rows, codes and scales of every probe, the output in float32.
    """
    by_id = 8.0
    for probe in plan.probes:
        store = plan.store(probe.store)
        by_id += store.width * store.bits / 8
        if isinstance(probe.address, Code):
            by_id += plan.store(probe.address.store).bits / 8
        if isinstance(probe.scale, Weight):
            by_id += plan.store(probe.scale.store).bits / 8
    return num_ids * by_id + batch_size * (8 + 4 * plan.embedding_dim)


def dense_plan(num_embeddings: int, embedding_dim: int) -> LookupPlan:
    """The plan of the full table."""
    return full_plan(TableSpec(num_embeddings, embedding_dim))
