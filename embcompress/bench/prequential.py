"""One pass in time order, every batch predicted before it is trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from embcompress.bench.settings import TrainingSettings
from embcompress.bench.training import (
    Score,
    StepObserver,
    Trained,
    TrainingLoop,
    evaluate,
    score,
)
from embcompress.data.click_log import ClickLog, Split
from embcompress.training.recipe import OverfittingGuard

#: Share of the training rows that phases of a search choose by.
_HELD_OUT = 0.1
#: Equal parts of the rows, in time order, that are scored one by one.
SLICES = 32


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

    Phases before the last are run on the training part, the last tenth of which is their
    validation examples.

    Args:
        split: in time order; every part is trained on. The validation part is for choices (the
            learning rate), the test part for the result.

    Source: Dawid, "Statistical theory: the prequential approach", JRSS A 147, 1984.
    """
    trained = Trained(model, learning_rate, OverfittingGuard(settings.patience))
    loop = TrainingLoop(trained, log, settings, observe)
    held_out = max(1, int(len(split.train) * _HELD_OUT))
    before, latest = split.train[:-held_out], split.train[-held_out:]
    rows = np.concatenate([split.train, split.validation, split.test])
    probability = np.empty(len(rows), np.float32)
    for phase in loop.phases(lambda: evaluate(model, log, latest).auc):
        if phase == loop.procedure.phases[-1]:
            loop.run_epoch(phase, rows, latest, probability)
        else:
            for _ in range(phase.epochs or 1):
                loop.run_epoch(phase, before, latest)
    cuts = np.cumsum([len(split.train), len(split.validation)])
    _, validation, test = np.split(probability.astype(np.float64), cuts)
    trained.end_epoch(score(log.labels[split.validation], validation))
    trained.prequential = score(log.labels[split.test], test)
    trained.over_time = slice_scores(log.labels[rows], probability.astype(np.float64))
    return trained


def slice_scores(
    labels: NDArray[np.uint8], probability: NDArray[np.float64], slices: int = SLICES
) -> list[Score | None]:
    """Scores of equal slices of predictions in time order; None where all labels are the same."""
    scores: list[Score | None] = []
    for label, predicted in zip(
        np.array_split(labels, slices), np.array_split(probability, slices), strict=True
    ):
        mixed = len(label) > 0 and label.min() != label.max()
        scores.append(score(label, predicted) if mixed else None)
    return scores
