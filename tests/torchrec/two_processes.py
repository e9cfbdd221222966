"""What every process of ``test_two_processes.py`` runs under torchrun.

Sharded models and one that is not are trained side by side: each process trains the latter by
itself on the whole batch, and the sharded one on its half. Both must go the same way.

    torchrun --nproc_per_node 2 -m tests.torchrec.two_processes results.json
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchrec
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

import embcompress as ec
import embcompress.torchrec as et
from tests.torchrec.model import Model, batch, loss, sharding_plan

BATCH, STEPS = 16, 20
RATES = {"sgd": 0.5, "rowwise_adagrad": 0.02}
METHODS: dict[str, Callable[[str], ec.Method]] = {
    "hash": lambda group: ec.Hashing(),
    "multihash": lambda group: ec.MultiHash(),
    "qr": lambda group: ec.QuotientRemainder(),
    "unified": lambda group: ec.Unified(group=group),
    "pq": lambda group: ec.ProductQuantization(),
    "low_dim": lambda group: ec.LowDim(),
}
#: How TorchRec shards its tables, and tables of up to how many bytes are not TorchRec's.
PLACEMENTS = {
    "row_wise": ("row_wise", 0),
    "data_parallel": ("data_parallel", 0),
    "engine": ("row_wise", 10**9),
    "mixed": ("table_wise", 20_000),
}


def compressed(method: str, *, is_weighted: bool = False) -> Model:
    torch.manual_seed(0)
    model = Model(is_weighted=is_weighted)
    make = METHODS[method]
    ec.compress(model, method={"bags.*": make("bags"), "rows.*": make("rows")}, budget="30%")
    return model


def run(
    method: str, placement: str, *, is_weighted: bool = False, optimizer: str = "sgd"
) -> dict[str, Any]:
    """Train both models, and say how far they are apart."""
    alone = compressed(method, is_weighted=is_weighted)
    model = lowered(copy.deepcopy(alone), placement)
    own = _torchrec_parameters(model)
    if own:
        rule = torch.optim.SGD if optimizer == "sgd" else torchrec.optim.RowWiseAdagrad
        more = {} if optimizer == "sgd" else {"eps": 1e-8}
        apply_optimizer_in_backward(rule, own, {"lr": RATES[optimizer], **more})
    sharded = et.distribute(model, plan=sharding_plan(model, PLACEMENTS[placement][0]))

    def distances() -> dict[str, float]:
        expected = compressed(method, is_weighted=is_weighted)
        expected.load_state_dict(alone.state_dict(), strict=False)  # optimizer state is left over
        return _distances(sharded.state_dict(), lowered(expected, placement).state_dict())

    start = copy.deepcopy(alone)
    steps = _steps(alone, sharded, optimizer, is_weighted)
    first, after_one = next(steps), distances()
    values = [first, *steps]
    after = distances()
    return {
        "method": method,
        "placement": placement,
        "optimizer": optimizer,
        "weighted": is_weighted,
        "values": max(values),
        # A step of SGD is the gradient times the rate.
        "gradients": max(after_one.values()) / RATES[optimizer] if optimizer == "sgd" else None,
        "weights": max(after.values()),
        "tensors": len(after),
        "moved": min(
            float((p - q).detach().abs().max())
            for p, q in zip(alone.parameters(), start.parameters(), strict=True)
        ),
    }


def lowered(model: nn.Module, placement: str) -> nn.Module:
    batch = et.Batch(dist.get_world_size(), BATCH // 2)
    et.lower(model, batch, data_parallel_bytes=PLACEMENTS[placement][1])
    return model


def _torchrec_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of TorchRec's tables."""
    kinds = (torchrec.EmbeddingBagCollection, torchrec.EmbeddingCollection)
    found = [module for module in model.modules() if type(module) in kinds]
    return [parameter for module in found for parameter in module.parameters()]


def _steps(
    alone: nn.Module, sharded: nn.Module, optimizer: str, is_weighted: bool
) -> Iterator[float]:
    """Train step by step; yields how far the outputs are apart before each update."""
    rate = RATES[optimizer]
    if optimizer != "sgd":
        ec.fuse_optimizer(alone, optimizer, lr=rate, eps=1e-8)
    rest = [p for p in alone.parameters() if p.requires_grad]
    first = torch.optim.SGD(rest, lr=rate)
    in_backward = {id(p) for p in sharded.parameters() if hasattr(p, "_in_backward_optimizers")}
    own = [p for p in sharded.parameters() if id(p) not in in_backward and p.requires_grad]
    second = torch.optim.SGD(own, lr=rate)
    half = slice(dist.get_rank() * BATCH // 2, (dist.get_rank() + 1) * BATCH // 2)
    for step in range(STEPS):
        whole, labels = batch(step, BATCH, is_weighted=is_weighted)
        part, part_labels = batch(step, BATCH, half, is_weighted=is_weighted)
        with torch.no_grad():
            apart = (sharded(part) - alone(whole)[half]).abs().max()
        for model, rule, inputs in (
            (alone, first, (whole, labels)),
            (sharded, second, (part, part_labels)),
        ):
            rule.zero_grad()
            loss(model, *inputs).backward()
            rule.step()
        yield float(apart)


def _distances(sharded: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, float]:
    """How far the tensors of a state are from the expected ones, or this process's part of them."""
    assert set(sharded) == set(expected)
    distances = {}
    for name, tensor in sharded.items():
        shards = [(tensor, [0])]
        if isinstance(tensor, ShardedTensor):
            shards = [(s.tensor, s.metadata.shard_offsets) for s in tensor.local_shards()]
        for values, (begin, *_) in shards:
            if values.numel():
                apart = values.float() - expected[name][begin : begin + len(values)].float()
                distances[name] = float(apart.abs().max())
    return distances


def checkpoints(method: str, folder: str) -> dict[str, Any]:
    """Save a sharded model, load it in one process, save it there, and load that sharded."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    half = slice(dist.get_rank() * BATCH // 2, (dist.get_rank() + 1) * BATCH // 2)
    part, whole = batch(0, BATCH, half)[0], batch(0, BATCH)[0]
    sharded = _sharded(method)
    with torch.no_grad():
        expected = sharded(part)
    dcp.save({"model": sharded.state_dict()}, checkpoint_id=f"{folder}/{method}/two")

    alone = lowered(_disturbed(compressed(method), generator), "row_wise")
    state = {"model": alone.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/{method}/two", no_dist=True)
    alone.load_state_dict(state["model"])
    with torch.no_grad():
        from_two_to_one = (alone(whole)[half] - expected).abs().max()
    if dist.get_rank() == 0:
        dcp.save(
            {"model": alone.state_dict()}, checkpoint_id=f"{folder}/{method}/one", no_dist=True
        )
    dist.barrier()

    again = _sharded(method, generator)
    state = {"model": again.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/{method}/one")
    again.load_state_dict(state["model"])
    et.lift(alone)
    with torch.no_grad():
        from_one_to_two = (again(part) - expected).abs().max()
        lifted = (alone(whole)[half] - expected).abs().max()
    return {
        "method": method,
        "from_two_to_one": float(from_two_to_one),
        "from_one_to_two": float(from_one_to_two),
        "lifted": float(lifted),
    }


def _disturbed(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The model with other values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def _sharded(method: str, generator: torch.Generator | None = None) -> nn.Module:
    model = compressed(method)
    if generator is not None:
        _disturbed(model, generator)
    model = lowered(model, "row_wise")
    apply_optimizer_in_backward(torch.optim.SGD, _torchrec_parameters(model), {"lr": 0.1})
    return et.distribute(model, plan=sharding_plan(model, "row_wise"))


def cases() -> list[dict[str, Any]]:
    """Training runs of all methods and placements."""
    products = ("qr",)
    results = []
    for placement in ("row_wise", "data_parallel", "engine"):
        for method in METHODS:
            if placement != "data_parallel" or method not in products:
                results.append(run(method, placement))
    results += [run(method, "mixed") for method in ("qr", "pq")]
    results += [
        run("multihash", "row_wise", is_weighted=True),
        run("qr", "mixed", is_weighted=True),
    ]
    results += [run(m, "row_wise", optimizer="rowwise_adagrad") for m in ("hash", "multihash")]
    return results


def main() -> None:
    """Run everything; the first process writes what all of them saw."""
    target = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    own = {
        "training": cases(),
        "checkpoints": [checkpoints(method, str(target.parent)) for method in ("qr", "low_dim")],
    }
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    if dist.get_rank() == 0:
        merged = {name: [each for part in every for each in part[name]] for name in own}
        target.write_text(json.dumps(merged), encoding="utf-8")
    gc.collect()  # sharded models are cycles, and their threads must end before the process does
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
