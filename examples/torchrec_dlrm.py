"""Train TorchRec's DLRM with compressed tables, in one process or several.

    python examples/torchrec_dlrm.py --data ml-100k=../shared/data/ml-100k
    torchrun --nproc_per_node 2 examples/torchrec_dlrm.py --method qr --budget 1% --save checkpoint

TorchRec's planner decides how the tables are sharded. A checkpoint of any number of processes
loads into any other. --cross adds a feature of pairs of the first two, with as many ids as it says:

    torchrun --nproc_per_node 2 examples/torchrec_dlrm.py --cross 1000000000 --embedding-dim 64 \
        --method hash --budget 64MB --epochs 1
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torchrec
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models.dlrm import DLRM
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

import embcompress as ec
import embcompress.torchrec as et
from embcompress.budget import format_bytes
from embcompress.data import ClickLog, load_click_log

#: Tables of so many bytes together are not built before they are compressed.
MOST_DENSE_BYTES = 1 << 30
KINDS = (torchrec.EmbeddingBagCollection, torchrec.EmbeddingCollection)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="synthetic:rows=50000", help="as of `embcompress sweep`")
    # Others need an ec.TrainingProcedure, which does nothing to tables that are lowered.
    methods = [name for name in ec.methods() if not ec.resolve_method(name).procedure_kind]
    parser.add_argument("--method", default="hash", choices=methods)
    parser.add_argument("--budget", default="1%", help="bytes or a share for all tables")
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--cross", type=int, default=0, help="ids of a feature of pairs; 0: none")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256, help="of each process")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--planned-processes", type=int, default=2, metavar="N",
                        help="decide for so many what is small; as for --load")  # fmt: skip
    parser.add_argument("--data-parallel-bytes", type=int, metavar="N",
                        help="tables of up to so many bytes are small; 0: none")  # fmt: skip
    parser.add_argument("--load", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--save", type=Path, help="where to write a checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def start_process() -> torch.device:
    """Join the other processes of torchrun, or be alone."""
    use_cuda = torch.cuda.is_available()
    backend = "nccl" if use_cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    if not use_cuda:
        torch.set_num_threads(1)  # threads that share out small batches wait for each other
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def say(text: object) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


# ------------------------------------------------------------------------------------------ data


class Batches:
    """Batches of a click log in TorchRec's form, this process's part of each."""

    def __init__(self, log: ClickLog, size: int, cross: int, device: torch.device) -> None:
        self.log, self.size, self.cross, self.device = log, size, cross, device
        names = [feature.name for feature in log.features]
        self.vocabularies = {f"f_{f.name}": f.num_embeddings for f in log.features}
        if cross:
            self.vocabularies[f"f_{names[0]}_x_{names[1]}"] = cross

    def __call__(
        self, rows: NDArray[np.int64]
    ) -> Iterator[tuple[Tensor, torchrec.KeyedJaggedTensor, Tensor]]:
        """Numbers, ids and labels; all processes get as many batches of one size."""
        world, rank = dist.get_world_size(), dist.get_rank()
        for start in range(0, len(rows) - self.size * world + 1, self.size * world):
            own = rows[start + rank * self.size :][: self.size]
            batch = self.log.batch(own)
            dense = batch.dense if batch.dense.shape[1] else torch.ones(len(own), 1)
            ids, lengths = batch.ids, batch.offsets.diff()
            if self.cross:
                pairs = self._pairs(batch.ids, batch.offsets, len(own))
                ids, lengths = torch.cat([ids, pairs]), torch.cat([lengths, torch.ones_like(pairs)])
            features = torchrec.KeyedJaggedTensor(list(self.vocabularies), ids, lengths=lengths)
            yield dense.to(self.device), features.to(self.device), batch.label.to(self.device)

    def _pairs(self, ids: Tensor, offsets: Tensor, size: int) -> Tensor:
        """An id for each pair of the first ids of the first two features."""
        first, second = ids[offsets[:size]], ids[offsets[size : 2 * size]]
        return (first * self.log.features[1].num_embeddings + second) * 1_000_003 % self.cross


# ----------------------------------------------------------------------------------------- model


def build(options: argparse.Namespace, batches: Batches, device: torch.device) -> DLRM:
    """TorchRec's DLRM, compressed."""
    torch.manual_seed(options.seed)
    width = options.embedding_dim
    dense_bytes = sum(batches.vocabularies.values()) * width * 4
    where = torch.device("meta") if dense_bytes > MOST_DENSE_BYTES else device
    tables = [
        torchrec.EmbeddingBagConfig(
            name=f"t_{name}", num_embeddings=rows, embedding_dim=width, feature_names=[name]
        )
        for name, rows in batches.vocabularies.items()
    ]
    model = DLRM(
        torchrec.EmbeddingBagCollection(tables, device=where),
        dense_in_features=max(1, len(batches.log.dense_names)),
        dense_arch_layer_sizes=[64, width],
        over_arch_layer_sizes=[64, 32, 1],
        dense_device=device,
    )
    say(ec.compress(model, method=options.method, budget=options.budget, seed=options.seed))
    return model


def shard(
    model: nn.Module, options: argparse.Namespace, device: torch.device
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Lower the tables, let the planner place them, and make the optimizers."""
    batch = et.Batch(options.planned_processes, options.batch_size)
    small = options.data_parallel_bytes
    say(f"\n{et.lower(model, batch, data_parallel_bytes=small)}\n")
    rows = [p for m in model.modules() if type(m) in KINDS for p in m.parameters()]
    if rows:
        rule = torchrec.optim.RowWiseAdagrad
        apply_optimizer_in_backward(rule, rows, {"lr": options.learning_rate})
    world = dist.get_world_size()
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world, local_world_size=world, compute_device=device.type),
        batch_size=options.batch_size,
        constraints=et.planner_constraints(model, batch),
    )
    plan = planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)
    for path, module in plan.plan.items():
        for table, placement in module.items():
            say(f"{path}: {table} is {placement.sharding_type} on {placement.ranks}")
    sharded = et.distribute(model, device=device, plan=plan)
    rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    dense = KeyedOptimizerWrapper(
        rest, lambda parameters: torch.optim.Adagrad(parameters, lr=options.learning_rate)
    )
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense])


def train_epoch(
    model: nn.Module, optimizer: CombinedOptimizer, batches: Batches, rows: NDArray[np.int64]
) -> None:
    """One pass."""
    model.train()
    started, steps, total = time.perf_counter(), 0, 0.0
    for dense, features, labels in batches(rows):
        optimizer.zero_grad()
        logits = model(dense, features).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        loss.backward()
        optimizer.step()
        steps, total = steps + 1, total + float(loss.detach())
    speed = steps * batches.size * dist.get_world_size() / (time.perf_counter() - started)
    say(f"  {steps} steps, log-loss {total / max(1, steps):.4f}, {speed:,.0f} rows/s")


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, rows: NDArray[np.int64]) -> str:
    """Scores of the rows of all processes."""
    model.eval()
    pairs = [
        torch.stack([model(dense, features).squeeze(1).sigmoid(), labels]).cpu().double()
        for dense, features, labels in batches(rows)
    ]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, torch.cat(pairs, dim=1).numpy())
    probability, label = np.concatenate(every, axis=1)
    auc, loss = roc_auc_score(label, probability), log_loss(label, probability, labels=[0, 1])
    return f"AUC {auc:.4f}, log-loss {loss:.4f} over {len(label):,} rows"


# ----------------------------------------------------------------------------------- checkpoints


def state(model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def save(path: Path, model: nn.Module, optimizer: CombinedOptimizer) -> None:
    checkpoint.save(state(model, optimizer), checkpoint_id=path)


def load(path: Path, model: nn.Module, optimizer: CombinedOptimizer) -> None:
    values = state(model, optimizer)
    checkpoint.load(values, checkpoint_id=path)
    model.load_state_dict(values["model"])
    optimizer.load_state_dict(values["optimizer"])


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process, now and at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def run(options: argparse.Namespace, device: torch.device) -> None:
    """Prepare, shard, train and evaluate."""
    if dist.get_rank() == 0:  # prepared once
        load_click_log(options.data)
    dist.barrier()
    log = load_click_log(options.data)
    batches = Batches(log, options.batch_size, options.cross, device)
    split = log.split("random", validation=0.1, test=0.1)
    model, optimizer = shard(build(options, batches, device), options, device)
    if options.load:
        load(options.load, model, optimizer)
        say(f"loaded {options.load}: {evaluate(model, batches, split.test)}")
    for epoch in range(1, options.epochs + 1):
        say(f"epoch {epoch} of {options.epochs}")
        order = np.random.default_rng(options.seed + epoch).permutation(split.train)
        train_epoch(model, optimizer, batches, order)
        say(f"  validation: {evaluate(model, batches, split.validation)}")
    say(f"test: {evaluate(model, batches, split.test)}")
    if options.save:
        save(options.save, model, optimizer)
        say(f"saved {options.save}")
    now, most = resident_bytes()
    print(
        f"process {dist.get_rank()}: {format_bytes(now)} resident, {format_bytes(most)} at most",
        flush=True,
    )


def main() -> None:
    options = arguments()
    run(options, start_process())
    gc.collect()  # a sharded model is a cycle, and its threads must end before the process does
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
