"""What every process of ``test_two_processes.py`` runs under torchrun.

Sharded models and one that is not are trained side by side: each process trains the latter by
itself on the whole batch, and the sharded one on its half. Both must go the same way.

    torchrun --nproc_per_node 2 -m tests.torchrec.two_processes results.json
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

import embcompress as ec
import embcompress.torchrec as et
from tests.torchrec.model import Model, batch, loss, sharding_plan

BATCH, STEPS, RATE = 16, 20, 0.5
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
        apply_optimizer_in_backward(rule, own, {"lr": RATE, **more})
    sharded = et.distribute(model, plan=sharding_plan(model, PLACEMENTS[placement][0]))

    def distances() -> dict[str, float]:
        expected = compressed(method, is_weighted=is_weighted)
        expected.load_state_dict(alone.state_dict(), strict=False)  # optimizer state is left over
        return _distances(sharded.state_dict(), lowered(expected, placement).state_dict())

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
        "gradients": max(after_one.values()) / RATE if optimizer == "sgd" else None,
        "weights": max(after.values()),
        "tensors": len(after),
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


def _steps(alone: nn.Module, sharded: nn.Module, optimizer: str, is_weighted: bool) -> Any:
    """Train step by step; yields how far the outputs are apart before each update."""
    if optimizer != "sgd":
        ec.fuse_optimizer(alone, optimizer, lr=RATE, eps=1e-8)
    rest = [p for p in alone.parameters() if p.requires_grad]
    first = torch.optim.SGD(rest, lr=RATE)
    in_backward = {id(p) for p in sharded.parameters() if hasattr(p, "_in_backward_optimizers")}
    own = [p for p in sharded.parameters() if id(p) not in in_backward and p.requires_grad]
    second = torch.optim.SGD(own, lr=RATE)
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


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = [run(method, placement) for method in METHODS for placement in PLACEMENTS]
    results.append(run("multihash", "row_wise", is_weighted=True))
    results.append(run("qr", "mixed", is_weighted=True))
    results += [run(m, "row_wise", optimizer="rowwise_adagrad") for m in ("hash", "multihash")]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, results)
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump([result for each in every for result in each], file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
