"""What the planner promises, measured on a click log: qualities kept, and plans that stay the same.

    python benchmarks/planner.py quality --data ml-100k=../shared/data/ml-100k
    python benchmarks/planner.py constants --data ml-100k=../shared/data/ml-100k --seeds 5
    python benchmarks/planner.py worths --data ml-100k=../shared/data/ml-100k --split time
    python benchmarks/planner.py stability docs/results/movielens-100k

``quality`` asks ``ec.compress`` for the fewest bytes that lose at most so much AUC, by training
rows alone, then trains the compressed and the full model and compares them on test rows.
``constants`` prints what widths and bits lose on validation rows, from which the planner has its
constants. ``worths`` prints what the planner measures each table to be worth, beside the entropy
of its ids. ``stability`` reads the records of a sweep: how many plans, and settings of the planner,
the seeds of each budget got.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import embcompress as ec
from embcompress.bench.planning import trial_data
from embcompress.bench.settings import TrainingSettings
from embcompress.bench.summary import load_records
from embcompress.bench.training import build_model, count_ids, deployed, evaluate, train
from embcompress.data import ClickLog, load_click_log
from embcompress.data.click_log import Split
from embcompress.methods.base import TableSpec
from embcompress.planner.loss import table_value
from embcompress.planner.trial_data import TrialData
from embcompress.planner.worth import train_full_tables

LEARNING_RATES = (0.03, 0.1)


def batches(log: ClickLog, split: Split, size: int) -> Iterator[tuple[Any, torch.Tensor]]:
    """Training rows as a data loader would yield them."""
    for start in range(0, len(split.train), size):
        batch = log.batch(split.train[start : start + size])
        yield (batch.dense, batch.ids, batch.offsets), batch.label


def quality(log: ClickLog, settings: TrainingSettings, limits: list[float], seeds: int) -> None:
    lost: dict[float, list[float]] = {limit: [] for limit in limits}
    for seed in range(seeds):
        split = log.split(settings.split, seed=seed)  # type: ignore[arg-type]
        full = test_auc(
            build_model(log, settings, "full", "100%", seed), log, split, settings, seed
        )
        for limit in limits:
            model = build_model(log, settings, "full", "100%", seed)
            started = time.perf_counter()
            data = batches(log, split, settings.batch_size)
            ec.compress(model, max_auc_loss=limit, data=data, plan_seconds=110, seed=seed)
            seconds, share = time.perf_counter() - started, ec.memory(model).ratio
            auc = test_auc(model, log, split, settings, seed)
            lost[limit].append(full - auc)
            print(
                f"seed {seed}: at most {limit:g}: {share:.2%} of the bytes in {seconds:.0f} s, "
                f"test AUC {auc:.4f} of {full:.4f}, lost {full - auc:+.4f}",
                flush=True,
            )
    for limit, values in lost.items():
        print(f"at most {limit:g}: lost {statistics.fmean(values):+.4f} on average")


def test_auc(
    model: torch.nn.Module, log: ClickLog, split: Split, settings: TrainingSettings, seed: int
) -> float:
    """Test AUC of the learning rate that is best on validation rows."""
    trained = [
        train(copy.deepcopy(model), log, split, settings, rate, seed) for rate in LEARNING_RATES
    ]
    best = max(trained, key=lambda each: each.best_auc)
    return evaluate(deployed(best, best.best_epoch), log, split.test).auc


def constants(log: ClickLog, settings: TrainingSettings, seeds: int) -> None:
    """Validation AUC of all tables at one width and number of bits."""
    means: dict[str, float] = {}
    for width, bits in ((0, 32), (1, 4), (2, 4), (4, 4), (1, 2), (1, 1)):
        method = ec.LowBit(width=width, bits=bits) if width else "full"
        aucs = []
        for seed in range(seeds):
            split = log.split(settings.split, seed=seed)  # type: ignore[arg-type]
            model = build_model(log, settings, method, "100%", seed)
            aucs.append(train(model, log, split, settings, LEARNING_RATES[0], seed).best_auc)
        name = f"{width} columns in {bits} bits" if width else "full"
        means[name] = statistics.fmean(aucs)
        print(f"{name}: {means[name]:.4f}, loses {means['full'] - means[name]:.4f}", flush=True)


def worths(log: ClickLog, settings: TrainingSettings, seeds: int) -> None:
    """Shares of what a model loses without each table, and of the entropy of its ids."""
    for seed in range(seeds):
        split = log.split(settings.split, seed=seed)  # type: ignore[arg-type]
        counts = count_ids(log, split.train)
        specs = [
            TableSpec(f.num_embeddings, settings.embedding_dim, f.name, counts=counts[f.name])
            for f in log.features
        ]

        def build(method: ec.Method, size: int, data: TrialData) -> torch.nn.Module:
            return build_model(log, settings, method, size, seed, counts)  # noqa: B023

        dense = sum(spec.dense_bytes for spec in specs)
        full = train_full_tables(build, dense, trial_data(log, split, settings), math.inf)
        assert full is not None
        measured = full.worths
        entropies = [table_value(spec).value for spec in specs]
        for spec, entropy in zip(specs, entropies, strict=True):
            worth = measured[f"t_{spec.name}"]
            print(
                f"seed {seed}, {spec.name}: {worth:.4f} nats, {worth / sum(measured.values()):.1%} "
                f"of all; entropy {entropy:.1f} bits, {entropy / sum(entropies):.1%}",
                flush=True,
            )


def stability(directory: Path) -> None:
    records = [r for r in load_records(directory) if r["method"] == "auto" and "auc" in r]
    for budget in dict.fromkeys(record["budget"] for record in records):
        cell = [record for record in records if record["budget"] == budget]
        # Hash keys are derived from the seed, and are no choice of the planner.
        plans = {
            re.sub(r"hash_[0-9a-f]{4}", "hash", str([table["plan"] for table in record["lookup"]]))
            for record in cell
        }
        settings = [record["tried"][0]["settings"] for record in cell]
        same = max(settings.count(each) for each in settings)
        seconds = [record["plan_seconds"] for record in cell]
        print(
            f"{budget}: {len(cell)} seeds, {len(plans)} plans, {same} with the same settings, "
            f"planned in {min(seconds):.0f} to {max(seconds):.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    keep = commands.add_parser("quality")
    keep.add_argument("--limits", nargs="+", type=float, default=[0.002, 0.005, 0.01, 0.03])
    fixed = commands.add_parser("constants")
    told = commands.add_parser("worths")
    for command in (keep, fixed, told):
        command.add_argument("--data", required=True)
        command.add_argument("--split", default="random", choices=("random", "time"))
        command.add_argument("--seeds", type=int, default=3)
        command.add_argument("--cache", type=Path)
    same = commands.add_parser("stability")
    same.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "stability":
        stability(arguments.directory)
        return
    torch.set_num_threads(1)
    log = load_click_log(arguments.data, cache=arguments.cache)
    settings = TrainingSettings(split=arguments.split)
    if arguments.command == "constants":
        constants(log, settings, arguments.seeds)
    elif arguments.command == "worths":
        worths(log, settings, arguments.seeds)
    else:
        quality(log, settings, arguments.limits, arguments.seeds)


if __name__ == "__main__":
    main()
