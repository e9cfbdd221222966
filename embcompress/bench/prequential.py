"""One pass in time order, every batch predicted before it is trained on."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from embcompress.bench.settings import TrainingSettings
from embcompress.bench.training import StepObserver, Trained, score
from embcompress.data.click_log import ClickLog, Split
from embcompress.recipe import OverfittingGuard, binary_step, make_optimizer
from embcompress.training import TrainingProcedure


def train_prequential(
    model: nn.Module,
    log: ClickLog,
    split: Split,
    settings: TrainingSettings,
    learning_rate: float,
    observe: StepObserver | None = None,
) -> Trained:
    """Train on all rows in their order, once, and score the predictions of the later ones.

    The measure for logs whose ids come and go: a model that is trained on one part of the time and
    tested on the next knows none of the ids that matter then. A prediction is made with what the
    model knew before the row's own batch; the forward pass of its training step is that prediction.

    Args:
        split: in time order; every part is trained on. The validation part is for choices (the
            learning rate), the test part for the result.

    Source: Dawid, "Statistical theory: the prequential approach", JRSS A 147, 1984.
    """
    trained = Trained(model, learning_rate, OverfittingGuard(settings.patience))
    optimizer = make_optimizer(model, learning_rate)
    procedure = TrainingProcedure(model, optimizer)
    rows = np.concatenate([split.train, split.validation, split.test])
    probability = np.empty(len(rows), np.float32)
    model.train()
    started = last = time.perf_counter()
    for start in range(0, len(rows), settings.batch_size):
        end = min(start + settings.batch_size, len(rows))
        batch = log.batch(rows[start:end])
        logits = model(batch.dense, batch.ids, batch.offsets)
        probability[start:end] = torch.sigmoid(logits.detach()).numpy()
        binary_step(optimizer, logits, batch.label)
        procedure.step()
        now = time.perf_counter()
        if observe is not None and now - last > 0.2:
            observe(1, end / len(rows), end / (now - started))
            last = now
    procedure.close()
    trained.train_seconds, trained.examples = time.perf_counter() - started, len(rows)
    cuts = np.cumsum([len(split.train), len(split.validation)])
    _, validation, test = np.split(probability.astype(np.float64), cuts)
    trained.end_epoch(score(log.labels[split.validation], validation))
    trained.prequential = score(log.labels[split.test], test)
    return trained
