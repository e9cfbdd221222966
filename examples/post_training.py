"""Compress the tables of a trained model, without and with one more epoch of training.

    python examples/post_training.py --data ml-100k=../shared/data/ml-100k

A DLRM is trained with full tables; they are then replaced by product-quantized and by 4-bit ones
that start from the trained weights (``keep_weights``).
"""

from __future__ import annotations

import argparse
import copy
import sys

import numpy as np
import torch
from torch import nn

import embcompress as ec
from embcompress.bench.settings import TrainingSettings
from embcompress.bench.training import (
    build_model,
    count_ids,
    evaluate,
    train,
)
from embcompress.data import ClickLog, load_click_log
from embcompress.models import DLRM


def compressed(
    model: DLRM, method: str, budget: str, counts: dict[str, torch.Tensor]
) -> tuple[DLRM, ec.CompressionReport]:
    """A copy of the model with compressed tables."""
    model = copy.deepcopy(model)
    paths = {f"embeddings.embedding_bags.t_{name}": each for name, each in counts.items()}
    report = ec.compress(model, method=method, budget=budget, counts=paths, keep_weights=True)
    return model, report


def distill_epoch(
    model: DLRM, teacher: DLRM, log: ClickLog, rows: np.ndarray, learning_rate: float
) -> None:
    """One more pass over the training rows, with the full model's predictions as labels.

    The clicks themselves have taught the full model as much as they can: another pass over them
    overfits.
    """
    ec.fuse_optimizer(model, "adagrad", lr=learning_rate)  # steps in the backward pass
    layers = torch.optim.Adagrad(ec.unfused_parameters(model), lr=learning_rate)
    procedure = ec.TrainingProcedure(model)  # for methods whose codes move as well
    model.train()
    for start in range(0, len(rows), 512):
        batch = log.batch(rows[start : start + 512])
        with torch.no_grad():
            label = teacher(batch.dense, batch.ids, batch.offsets).sigmoid()
        layers.zero_grad()
        logits = model(batch.dense, batch.ids, batch.offsets)
        nn.functional.binary_cross_entropy_with_logits(logits, label).backward()
        layers.step()
        procedure.step()
    procedure.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="synthetic", help="as in `embcompress sweep`")
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--methods", default="pq,int4")
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--distillation-rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    methods = options.methods.split(",")
    if unknown := sorted(set(methods) - set(ec.methods())):
        parser.error(f"unknown methods {unknown}; known methods: {', '.join(ec.methods())}")
    torch.set_num_threads(1)
    settings = TrainingSettings()
    log = load_click_log(options.data)
    split = log.split("random", seed=options.seed)
    counts = count_ids(log, split.train)
    model = build_model(log, settings, "full", "100%", options.seed)
    trained = train(model, log, split, settings, options.learning_rate, options.seed)
    model = build_model(log, settings, "full", "100%", options.seed)
    state = trained.guard.states[trained.best_epoch]
    model.load_state_dict({k: v for k, v in state.items() if ".optimizer_" not in k})
    before = evaluate(model, log, split.test)
    size = ec.memory(model).total
    print(f"full      {size:>9,} bytes  test AUC {before.auc:.4f}")
    rng = np.random.default_rng(options.seed)
    for method in methods:
        try:
            small, report = compressed(model, method, options.budget, counts)
        except ec.BudgetError as error:
            print(f"{method:8}  {error}")
            small, report = compressed(model, method, str(error.smallest), counts)
        print(report)
        score = evaluate(ec.deploy(copy.deepcopy(small)), log, split.test)
        print(f"{method:8}  {report.after:>9,} bytes  test AUC {score.auc:.4f}", end="")
        print(f" ({score.auc - before.auc:+.4f}) as it is", end="")
        rows = rng.permutation(split.train)
        distill_epoch(small, model, log, rows, options.distillation_rate)
        score = evaluate(ec.deploy(small), log, split.test)
        print(f", {score.auc:.4f} ({score.auc - before.auc:+.4f}) after one more epoch")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ec.BudgetError) as error:  # a path or a budget that cannot be
        sys.exit(f"error: {error}")
