"""What travels between the processes of a sharded model, estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from embcompress.budget import format_bytes
from embcompress.lowering.tables import LogicalTable, PhysicalTable
from embcompress.text_table import text_table
from embcompress.torchrec.collections import COMPRESSED, logical_tables
from embcompress.torchrec.tables import LoweredTables

Placement = Literal["data-parallel", "sharded"]
_INTEGER_BYTES = 8
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process sends for one table in one training step.

    Attributes:
        table: its name.
        bytes: of the table.
        exchanged: where its rows are divided among the processes.
        reduced: where every process holds them all.
        is_replicated: whether the model holds it, so that only the second remains.
    """

    table: str
    bytes: int
    exchanged: int
    reduced: int
    is_replicated: bool = False

    @property
    def placement(self) -> Placement:
        """The one that sends less, where there is a choice."""
        cheaper = self.is_replicated or self.reduced <= self.exchanged
        return "data-parallel" if cheaper else "sharded"

    @property
    def sent(self) -> int:
        """Bytes that this placement sends."""
        return self.reduced if self.placement == "data-parallel" else self.exchanged


@dataclass(frozen=True)
class TrafficReport:
    """What a process sends in a training step; prints as a table.

    Attributes:
        before: for the float32 tables that the model stands for, by their own names.
        after: for physical tables.
        replicated: for heads, shared scales, and tables that this library's engine runs.
    """

    before: tuple[Traffic, ...] = field(default_factory=tuple)
    after: tuple[Traffic, ...] = field(default_factory=tuple)
    replicated: int = 0

    @property
    def sent_before(self) -> int:
        """Bytes with the dense tables."""
        return sum(each.sent for each in self.before)

    @property
    def sent(self) -> int:
        """Bytes with the lowered tables."""
        return sum(each.sent for each in self.after) + self.replicated

    def __str__(self) -> str:
        header = ("", "table", "bytes", "sends if sharded", "if data-parallel", "placement")
        rows = [
            (when, t.table, *map(format_bytes, (t.bytes, t.exchanged, t.reduced)), t.placement)
            for when, tables in (("before", self.before), ("after", self.after))
            for t in tables
        ]
        return (
            f"{text_table(header, rows)}\n"
            f"a process sends {format_bytes(self.sent_before)} a step before, "
            f"{format_bytes(self.sent)} after, of which {format_bytes(self.replicated)} for heads, "
            "scales and tables that the engine runs"
        )


@dataclass(frozen=True)
class Batch:
    """The batches of a training run, as far as they decide what is sent.

    Attributes:
        world_size: processes.
        size: examples of one process.
        pooling_factors: ids of an example by feature; 1 where not given.
    """

    world_size: int
    size: int
    pooling_factors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.size < 1:
            raise ValueError(
                f"world_size and size must be at least 1, got {self.world_size} and {self.size}"
            )

    @property
    def share(self) -> float:
        """Of what a process needs, the part that is elsewhere."""
        return (self.world_size - 1) / self.world_size

    def ids(self, feature: str) -> float:
        """Ids of a feature in a process's batch."""
        return self.size * self.pooling_factors.get(feature, 1.0)

    def traffic(self, name: str, size: int, width: int, rows: float, vectors: float) -> Traffic:
        """Of a table of some bytes.

        Args:
            rows, vectors: that a process reads from it, and that it gets back.
        """
        sent = rows * _INTEGER_BYTES + 2 * vectors * width * _FLOAT_BYTES
        return Traffic(name, size, round(self.share * sent), round(2 * self.share * size))


def traffic(model: nn.Module, batch: Batch) -> TrafficReport:
    """Estimate what a process sends in a training step of a lowered model.

    Of the rows that a process reads, a share of (world_size − 1) / world_size is elsewhere. For
    a sharded table it sends their numbers, 8 bytes each, gets float32 vectors (one a bag where
    TorchRec pools, else one a row), and sends their gradients; the vectors that it sends to others
    are as many. For a data-parallel one it sends the gradient of the whole table twice, as a ring
    of processes does. Lengths of bags and latencies are not counted. The dense tables before are
    judged by the same rule.

    Args:
        model: that :func:`embcompress.torchrec.lower` has lowered, sharded or not.
        batch: of the processes.
    """
    before: list[Traffic] = []
    after: list[Traffic] = []
    replicated: set[nn.Parameter] = set()
    for collection in model.modules():
        if isinstance(collection, LoweredTables):
            lowering = collection.lowering
            before += [_dense_traffic(batch, table) for table in lowering.tables]
            after += [physical_traffic(batch, table) for table in lowering.physical]
            replicated.update(collection.readers.parameters())
        elif isinstance(collection, COMPRESSED):  # all of it, or what was not lowered of one
            before += [_dense_traffic(batch, table) for table in logical_tables(collection)]
            replicated.update(collection.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in replicated)
    return TrafficReport(tuple(before), tuple(after), round(2 * batch.share * size))


def _dense_traffic(batch: Batch, table: LogicalTable) -> Traffic:
    ids = sum(batch.ids(feature) for feature in table.features)
    pooled = table.plan.pool != "none"
    vectors = batch.size * len(table.features) if pooled else ids
    plan = table.plan
    return batch.traffic(table.name, plan.dense_bytes, plan.embedding_dim, ids, vectors)


def physical_traffic(batch: Batch, table: PhysicalTable) -> Traffic:
    """Of a physical table."""
    rows = sum(
        batch.ids(feature) * count
        for feature, count in zip(table.model_features, table.queries, strict=True)
    )
    vectors = batch.size * len(table.features) if table.pooled else rows
    sent = batch.traffic(table.name, table.bytes, table.columns, rows, vectors)
    return replace(sent, is_replicated=table.is_small)
