"""Training steps: forward, backward and optimizer, compressed tables against full ones.

    python benchmarks/train_step.py            # everything; about half an hour, 8 GB of memory
    python benchmarks/train_step.py --quick    # one small table, a minute

Ours with row-wise Adagrad fused into backward; ``torch.nn.EmbeddingBag(sparse=True)`` on the full
table and each method composed from torch ops, with ``torch.optim.Adagrad``; FBGEMM's table-batched
embedding on the full table with its fused row-wise Adagrad. And a step of a whole DLRM.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from contestants import (
    Compressed,
    compressed_tables,
    default_methods,
    dense_plan,
    engine_name,
    fbgemm_tables,
    full_weight,
    has_fbgemm,
    parse_method,
    torch_full,
)
from criteo import CRITEO_CARDINALITIES, CollectionBatch, make_collection_batches
from measure import Batch, make_batches, warn_if_busy
from report import COMPOSED, FBGEMM, FULL, OURS, Benchmark, Contestant, Setting
from torch import Tensor, nn

import embcompress as ec
from embcompress.models import DLRM
from embcompress.optimizers import fuse_optimizer

LEARNING_RATE = 0.01
WIDTH = 16  # of the DLRM
DENSE_FEATURES = 13
LAYERS = "the layers alone"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small table and few rounds")
    parser.add_argument("--rows", type=int, nargs="+", default=[8_000_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--bags", type=int, nargs="+", default=[1, 20], help="ids a bag")
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument(
        "--dlrm-batches",
        type=int,
        nargs="+",
        default=[128, 2048, 16384],
        help="of the DLRM; 128 is that of its own script for Criteo Kaggle",
    )
    parser.add_argument("--distributions", nargs="+", default=["power-law"])
    parser.add_argument("--budgets", nargs="+", default=["10%", "1%"])
    parser.add_argument("--methods", nargs="+", default=default_methods())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-tables", action="store_true", help="the DLRM alone")
    parser.add_argument("--no-dlrm", action="store_true", help="the single tables alone")
    parser.add_argument("--no-fbgemm", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results/train_step"))
    options = parser.parse_args()
    if options.quick:
        options.rows, options.widths, options.bags = [200_000], [16], [1]
        options.batches, options.dlrm_batches, options.rounds = [2048], [2048], 5
    return options


def update_tables(module: nn.Module) -> Callable[[], None]:
    """Row-wise Adagrad fused into the backward of our tables; nothing is left to call after it."""
    fuse_optimizer(module, "rowwise_adagrad", lr=LEARNING_RATE)
    return lambda: None


def step_of(parameters: Sequence[nn.Parameter], fused: bool = False) -> Callable[[], None]:
    """A step of torch's Adagrad, and gradients set to None; fused ones take no sparse gradients."""
    optimizer = torch.optim.Adagrad(parameters, lr=LEARNING_RATE, fused=fused or None)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---------------------------------------------------------------------------------- single tables


@dataclass(frozen=True)
class Trained:
    """A table, and what updates it after backward."""

    forward: Callable[[Batch], Tensor]
    update: Callable[[], None]

    def run(self, batch: Batch, gradient: Tensor) -> None:
        self.forward(batch).backward(gradient)
        self.update()


def full_tables(rows: int, width: int, use_fbgemm: bool) -> dict[str, Trained]:
    """The full table in torch and in FBGEMM, over the same memory: they only take turns."""
    trained, weight = {}, None
    if use_fbgemm:
        fbgemm, (weight,) = fbgemm_tables([(rows, width)], LEARNING_RATE)
        trained[FBGEMM] = Trained(lambda batch: fbgemm(batch.ids, batch.offsets), lambda: None)
    weight = full_weight(rows, width) if weight is None else weight
    full = torch_full(weight, sparse=True)
    step = step_of(list(full.parameters()))
    return {FULL: Trained(lambda batch: full(batch.ids, batch.starts), step), **trained}


def trained_pair(each: Compressed) -> dict[str, Trained]:
    """Ours and its composition."""
    step = step_of(list(each.composition.parameters()))
    return {
        OURS: Trained(lambda batch: each.table(batch.ids, batch.starts), update_tables(each.table)),
        COMPOSED: Trained(each.composition, step),
    }


def run_tables(options: argparse.Namespace, benchmark: Benchmark) -> None:
    generator = np.random.default_rng(0)
    for rows in options.rows:
        for width in options.widths:
            plan = dense_plan(rows, width)
            full = full_tables(rows, width, has_fbgemm() and not options.no_fbgemm)
            tables = compressed_tables(rows, width, options.methods, options.budgets, sparse=True)
            pairs = [(each, trained_pair(each)) for each in tables]
            for distribution in options.distributions:
                for bag in options.bags:
                    for batch in options.batches:
                        setting = Setting(f"{rows:,} rows", width, distribution, bag, batch)
                        gradient = torch.randn(batch, width) / batch
                        contestants = [
                            Contestant(name, _run(trained, gradient), plan=plan)
                            for name, trained in full.items()
                        ]
                        for each, pair in pairs:
                            contestants += [
                                Contestant(
                                    name,
                                    _run(trained, gradient),
                                    each.method,
                                    each.budget,
                                    plan=each.table.plan,
                                )
                                for name, trained in pair.items()
                            ]
                        benchmark.measure(
                            setting,
                            contestants,
                            lambda setting=setting, rows=rows: make_batches(
                                setting.distribution,
                                rows,
                                setting.batch_size,
                                setting.bag_length,
                                generator,
                            ),
                            options.rounds,
                            batch * bag,
                        )


def _run(trained: Trained, gradient: Tensor) -> Callable[[Batch], None]:
    return lambda batch: trained.run(batch, gradient)


# ------------------------------------------------------------------------------------------- DLRM


class SeparateBags(nn.Module):
    """The tables of a DLRM as it is written in plain torch: one ``nn.EmbeddingBag`` a feature."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.bags = nn.ModuleList(torch_full(weight, sparse=True) for weight in weights)
        self.embedding_dims = tuple(weight.shape[1] for weight in weights)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        size = ids.numel() // len(self.bags)  # one id a bag
        parts = zip(self.bags, ids.split(size), strict=True)
        return torch.cat([bag(part, offsets[:size]) for bag, part in parts], dim=1)


class Batched(nn.Module):
    """FBGEMM's tables as a DLRM takes them."""

    def __init__(self, tables: nn.Module, embedding_dims: Sequence[int]) -> None:
        super().__init__()
        self.tables = tables
        self.embedding_dims = tuple(embedding_dims)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.tables(ids, offsets)


class NoTables(nn.Module):
    """Vectors that are there already: what is left of a step are the layers. The time of no table
    at all, and the bound of what any table can gain."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.embedding_dims = (WIDTH,) * num_features
        self.vectors: dict[int, Tensor] = {}

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        size = ids.numel() // len(self.embedding_dims)
        if size not in self.vectors:
            shape = (size, WIDTH * len(self.embedding_dims))
            self.vectors[size] = torch.randn(shape).requires_grad_()
        self.vectors[size].grad = None
        return self.vectors[size]


@dataclass(frozen=True)
class Click:
    """Numbers, ids and labels of one batch."""

    dense: Tensor
    ids: CollectionBatch
    label: Tensor


def training_step(tables: Any, update: Callable[[], None]) -> Callable[[Click], None]:
    """A whole step of the example's DLRM over these tables."""
    torch.manual_seed(0)
    model = DLRM(tables, DENSE_FEATURES, bottom_widths=(512, 256, 64), top_widths=(512, 256))
    step = step_of([*model.bottom.parameters(), *model.top.parameters()], fused=True)

    def run(click: Click) -> None:
        logits = model(click.dense, click.ids.ids, click.ids.offsets)
        F.binary_cross_entropy_with_logits(logits, click.label).backward()
        step()
        update()

    return run


def dlrm_contestants(options: argparse.Namespace) -> list[Contestant]:
    shapes = [(rows, WIDTH) for rows in CRITEO_CARDINALITIES]
    contestants, weights = [], None
    if has_fbgemm() and not options.no_fbgemm:
        fbgemm, weights = fbgemm_tables(shapes, LEARNING_RATE)
        batched = Batched(fbgemm, [WIDTH] * len(shapes))
        contestants.append(Contestant(FBGEMM, training_step(batched, lambda: None)))
    full = SeparateBags([full_weight(*s) for s in shapes] if weights is None else weights)
    step = step_of(list(full.parameters()))
    contestants.insert(0, Contestant(FULL, training_step(full, step)))
    layers = training_step(NoTables(len(shapes)), lambda: None)
    contestants.append(Contestant(LAYERS, layers))
    configs = [ec.TableConfig(f"C{i + 1}", *shape) for i, shape in enumerate(shapes)]
    for budget in options.budgets:
        for method in options.methods:
            try:
                chosen = parse_method(method)
                tables = ec.EmbeddingBagCollection(configs, method=chosen, budget=budget)
            except ec.BudgetError as error:
                print(f"left out: {error}")
                continue
            step = training_step(tables, update_tables(tables))
            contestants.append(Contestant(OURS, step, method, budget))
    return contestants


def run_dlrm(options: argparse.Namespace, benchmark: Benchmark) -> None:
    generator = np.random.default_rng(1)
    contestants = dlrm_contestants(options)

    def make_clicks(distribution: str, size: int) -> list[Click]:
        return [
            Click(torch.rand(size, DENSE_FEATURES), batch, (torch.rand(size) < 0.25).float())
            for batch in make_collection_batches(distribution, size, generator)
        ]

    for distribution in options.distributions:
        for size in options.dlrm_batches:
            benchmark.measure(
                Setting("DLRM, 26 tables of Criteo", WIDTH, distribution, 1, size),
                contestants,
                lambda distribution=distribution, size=size: make_clicks(distribution, size),
                options.rounds,
                size * len(CRITEO_CARDINALITIES),
            )


def main() -> None:
    options = arguments()
    warn_if_busy()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Sparse invariant checks")  # of torch's own Adagrad
    print(f"embcompress runs {engine_name()}")
    benchmark = Benchmark(options.out)
    if not options.no_tables:
        run_tables(options, benchmark)
    if not options.no_dlrm:
        run_dlrm(options, benchmark)
    benchmark.finish("Training steps: forward, backward and Adagrad")


if __name__ == "__main__":
    main()
