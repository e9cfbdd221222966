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
from pathlib import Path

import numpy as np
import torch
from torch import nn

import embcompress as ec
from embcompress.bench.training import evaluate, make_optimizer
from embcompress.data import ClickLog, load_click_log
from embcompress.models import DLRM

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


def build(log: ClickLog, width: int, method: str, budget: str, seed: int) -> DLRM:
    """A DLRM over compressed tables; the full ones are never built."""
    torch.manual_seed(seed)
    tables = [
        ec.TableConfig(f"t_{f.name}", f.num_embeddings, width, (f.name,)) for f in log.features
    ]
    collection = ec.EmbeddingBagCollection(tables, method=method, budget=budget, seed=seed)
    collection.reset_parameters(std=0.05)
    return DLRM(
        collection, len(log.dense_names), bottom_widths=(512, 256, 64), top_widths=(512, 256)
    )


def train_epoch(
    model: DLRM, log: ClickLog, rows: np.ndarray, batch_size: int, optimizer: torch.optim.Optimizer
) -> None:
    """One pass, printing the mean log-loss of every tenth of it."""
    model.train()
    starts = range(0, len(rows), batch_size)
    total, steps, started = 0.0, 0, time.perf_counter()
    for number, start in enumerate(starts, 1):
        batch = log.batch(rows[start : start + batch_size])
        optimizer.zero_grad(set_to_none=True)
        logits = model(batch.dense, batch.ids, batch.offsets)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.label)
        loss.backward()
        optimizer.step()
        total, steps = total + float(loss.detach()), steps + 1
        if number % max(1, len(starts) // 10) == 0:
            speed = min(start + batch_size, len(rows)) / (time.perf_counter() - started)
            print(
                f"  step {number}/{len(starts)}: log-loss {total / steps:.4f}, {speed:,.0f} rows/s"
            )
            total, steps = 0.0, 0


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
    model = build(log, options.embedding_dim, options.method, options.budget, options.seed)
    size = ec.memory(model)
    print(size)
    print(f"bytes of the tables: {size.dense:,} before, {size.total:,} after ({size.ratio:.2%})")
    optimizer = make_optimizer(model, options.learning_rate, fused=True)
    for epoch in range(1, epochs + 1):
        print(f"epoch {epoch} of {epochs}")
        train_epoch(model, log, split.train, batch_size, optimizer)
        score = evaluate(model, log, split.validation)
        print(f"  validation: AUC {score.auc:.4f}, log-loss {score.logloss:.4f}")
    score = evaluate(model, log, split.test)
    print(f"test: AUC {score.auc:.4f}, log-loss {score.logloss:.4f}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ec.BudgetError) as error:  # a path or a budget that cannot be
        sys.exit(f"error: {error}")
