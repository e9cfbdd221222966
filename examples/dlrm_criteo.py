"""Prepare a Criteo file, train a DLRM with compressed tables, and evaluate it.

    python examples/dlrm_criteo.py --data day_0.gz --method qr --budget 1%

The defaults suit the full Kaggle file (45.8M rows): one epoch, split by time, and values seen
fewer than 10 times share one id (the optimizer's step touches every row of the tables, and rare
values are most of the rows). A small file is gone over several times, in small batches, so that
there is something to see.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
from torch import nn

import embcompress as ec
from embcompress.bench.training import count_ids, evaluate, sample_co_occurrence
from embcompress.data import ClickLog, load_click_log
from embcompress.data.click_log import Batch, Split
from embcompress.models import DLRM
from embcompress.training.recipe import make_optimizer, validation_step

SMALL_ROWS = 1_000_000
SMALL_BYTES = 256_000_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a Criteo text file (.gz) or a directory")
    parser.add_argument("--method", default="qr", choices=list(ec.methods()))
    parser.add_argument("--budget", default="10%", help="bytes or a share for all tables")
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--epochs", type=int, help="default: 1, or 2 for a small file")
    parser.add_argument("--batch-size", type=int, help="default: 2048, or 128 for a small file")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument(
        "--min-count", type=int, help="rarer values share one id; default: 10, small file: 1"
    )
    parser.add_argument("--threads", type=int, help="of torch; default: all cores, small file: 1")
    parser.add_argument("--cache", help="where prepared data is kept")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def file_bytes(path: Path) -> int:
    """Size of a file, or of all files of a directory; 0 if there is none."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def build(log: ClickLog, rows: np.ndarray, width: int, method: str, budget: str, seed: int) -> DLRM:
    """A DLRM over compressed tables; the full ones are never built.

    Methods that treat frequent ids better, or like ids alike, learn from the training rows which
    these are.
    """
    torch.manual_seed(seed)
    counts = count_ids(log, rows)
    alike = sample_co_occurrence(log, rows) if ec.resolve_method(method).uses_co_occurrence else {}
    tables = [
        ec.TableConfig(
            f"t_{f.name}", f.num_embeddings, width, (f.name,),
            counts=counts[f.name], co_occurrence=alike.get(f.name),
        )
        for f in log.features
    ]  # fmt: skip
    collection = ec.EmbeddingBagCollection(tables, method=method, budget=budget, seed=seed)
    collection.reset_parameters(std=0.05)
    return DLRM(
        collection, len(log.dense_names), bottom_widths=(512, 256, 64), top_widths=(512, 256)
    )


def batches(log: ClickLog, rows: np.ndarray, size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        yield log.batch(rows[start : start + size])


def train_epoch(
    model: DLRM,
    log: ClickLog,
    split: Split,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    procedure: ec.TrainingProcedure,
) -> None:
    """One pass, printing the mean log-loss of every tenth of it."""
    model.train()
    steps = -(-len(split.train) // batch_size)
    # Some methods search by validation examples, in a phase of their own.
    is_search = procedure.phase is not None and procedure.phase.split == "validation"
    shown = chain.from_iterable(batches(log, part, batch_size) for part in repeat(split.validation))
    total, summed, rows, started = 0.0, 0, 0, time.perf_counter()
    for number, batch in enumerate(batches(log, split.train, batch_size), 1):
        optimizer.zero_grad(set_to_none=True)
        logits = model(batch.dense, batch.ids, batch.offsets)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.label)
        loss.backward()
        optimizer.step()
        if is_search:
            other = next(shown)
            inputs = (other.dense, other.ids, other.offsets)
            validation_step(procedure, partial(model, *inputs), other.label)
        procedure.step()  # what a method does between the optimizer's steps
        total, summed, rows = total + float(loss.detach()), summed + 1, rows + len(batch.label)
        if number % max(1, steps // 10) == 0:
            speed = rows / (time.perf_counter() - started)
            print(f"  step {number}/{steps}: log-loss {total / summed:.4f}, {speed:,.0f} rows/s")
            total, summed = 0.0, 0


def train(
    model: DLRM, log: ClickLog, split: Split, epochs: int, batch_size: int, learning_rate: float
) -> None:
    """Every phase that the method asks for; most have one."""
    procedure = ec.TrainingProcedure(model)
    while phase := procedure.begin_phase(lambda: evaluate(model, log, split.validation).auc):
        optimizer = make_optimizer(model, learning_rate, fused=True)
        procedure.attach(optimizer)
        last = phase.epochs or epochs
        for epoch in range(1, last + 1):
            print(f"{phase.name}: epoch {epoch} of {last}")
            train_epoch(model, log, split, batch_size, optimizer, procedure)
            score = evaluate(model, log, split.validation)
            print(f"  validation: AUC {score.auc:.4f}, log-loss {score.logloss:.4f}")
    procedure.close()


def main() -> None:
    options = arguments()
    min_count = options.min_count or (1 if file_bytes(Path(options.data)) < SMALL_BYTES else 10)
    log = load_click_log(f"criteo={options.data},min_count={min_count}", cache=options.cache)
    small = len(log) < SMALL_ROWS
    # Threads that share out the operators of a small batch mostly wait for each other.
    torch.set_num_threads(options.threads or (1 if small else torch.get_num_threads()))
    epochs = options.epochs or (2 if small else 1)
    batch_size = options.batch_size or (128 if small else 2048)
    split = log.split("time", validation=0.07, test=0.07)
    print(f"{len(log):,} rows: {len(split.train):,} train, then validation and test in time order")
    model = build(
        log, split.train, options.embedding_dim, options.method, options.budget, options.seed
    )
    size = ec.memory(model)
    print(size)
    print(f"bytes of the tables: {size.dense:,} before, {size.total:,} after ({size.ratio:.2%})")
    train(model, log, split, epochs, batch_size, options.learning_rate)
    score = evaluate(model, log, split.test)
    print(f"test: AUC {score.auc:.4f}, log-loss {score.logloss:.4f}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ec.BudgetError) as error:  # a path or a budget that cannot be
        sys.exit(f"error: {error}")
