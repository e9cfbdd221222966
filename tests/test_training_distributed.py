"""Processes that train copies of a model change them alike, or are told why they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import embcompress as ec
from embcompress.layouts.pruned import PrunedLayout

ROWS, BATCH = 200, 30
METHODS = ("full", "hash", "qr", "low_bit", "dhe", "tt")


class Model(torch.nn.Module):
    """Tables of one call, a table of its own, and a layer."""

    def __init__(self, method: str) -> None:
        super().__init__()
        budget = None if method == "full" else "40%"
        tables = [ec.TableConfig(name, ROWS, 4) for name in "ab"]
        self.collection = ec.EmbeddingBagCollection(tables, method=method, budget=budget)
        self.table = ec.Embedding(ROWS, 4, method=method, budget=budget)
        self.layer = torch.nn.Linear(12, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        pooled = self.collection({"a": ids, "b": ids})
        return self.layer(torch.cat([pooled, self.table(ids)], dim=1))


def _train(rank: int, folder: str) -> None:
    """Each process sees half of every batch; rank 2 is one process that sees all of it."""
    group = None
    if rank < 2:
        store = dist.FileStore(f"{folder}/store", 2)
        dist.init_process_group(
            "gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=60)
        )
        group = dist.group.WORLD
    torch.manual_seed(0)
    method = ec.Pruned(interval=2, rate=1.0, decay=0.5)  # halves are exact
    table = ec.Embedding(ROWS, 4, method=method, budget="30%")
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    procedure = ec.TrainingProcedure(table, optimizer, process_group=group)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        ids = (torch.rand(BATCH, generator=generator) ** 3 * ROWS).long()
        own = ids if group is None else ids.reshape(2, -1)[rank]
        optimizer.zero_grad()
        (table(own) - 1).square().sum().backward()
        if group is not None:
            dist.all_reduce(table.weight.grad)
        optimizer.step()
        procedure.step()
    assert int(procedure.tables[""].tensor("moves")) > 0
    kept = PrunedLayout.of(table.plan).kept_ids(table.codes)
    torch.save([kept, table.weight.detach()], f"{folder}/{rank}.pt")
    if group is not None:
        torch.save(_train_cafe(rank, group), f"{folder}/cafe_{rank}.pt")
    torch.save(
        {name: _train_replica(rank, name) for name in METHODS}, f"{folder}/replica_{rank}.pt"
    )
    if group is not None:
        dist.destroy_process_group()


def _train_replica(rank: int, method: str) -> list[torch.Tensor]:
    """The weights of a model that is wrapped where there are two processes."""
    torch.manual_seed(0)
    model = Model(method)
    wrapped = DistributedDataParallel(model) if rank < 2 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        ids = torch.randint(0, ROWS, (BATCH,), generator=generator)
        optimizer.zero_grad()
        wrapped(ids if rank == 2 else ids.reshape(2, -1)[rank]).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def _train_cafe(rank: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The keys and rows of a table whose hot ids are those of the first process."""
    torch.manual_seed(0)
    table = ec.Embedding(ROWS, 4, method=ec.Cafe(interval=2), budget="30%")
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    procedure = ec.TrainingProcedure(table, optimizer, process_group=group)
    generator = torch.Generator().manual_seed(2 + rank)
    for _ in range(8):
        ids = (torch.rand(BATCH, generator=generator) ** 3 * ROWS).long()
        optimizer.zero_grad()
        (table(ids) - 1).square().sum().backward()
        dist.all_reduce(table.weight.grad)
        optimizer.step()
        procedure.step()
    assert int(procedure.tables[""].tensor("moves")) > 0
    return [table.keys, table.weight.detach()]


@pytest.fixture
def two_replicas() -> Iterator[None]:
    """This process is the first of two, of which the other answers nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_replicas")
@pytest.mark.parametrize("module", ["collection", "table"])
def test_replicas_refuse_a_fused_optimizer(module: str) -> None:
    model, ids = Model("hash"), torch.arange(8)
    ec.fuse_optimizer(model.get_submodule(module), "sgd", lr=0.1)
    replica = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="replicas would drift apart"):
        replica(ids)
    with torch.no_grad():
        assert torch.equal(replica(ids), model(ids))


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(_train, (str(tmp_path),), nprocs=3)
    first, second, alone = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first[0], alone[0])
    torch.testing.assert_close(first[1], alone[1])
    first, second = (torch.load(tmp_path / f"cafe_{rank}.pt") for rank in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    first, second, alone = (torch.load(tmp_path / f"replica_{rank}.pt") for rank in range(3))
    for method in METHODS:
        for one, other, expected in zip(first[method], second[method], alone[method], strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, expected)
