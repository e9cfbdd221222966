"""Two processes that train copies of a model change them alike."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import embcompress as ec
from embcompress.layouts.pruned import PrunedLayout

ROWS, BATCH = 200, 30


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
        dist.destroy_process_group()


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
