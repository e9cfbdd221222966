"""Training one model on one click log: the loop that every method shares."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embcompress.bench.settings import TrainingSettings
from embcompress.collection import EmbeddingBagCollection, TableConfig
from embcompress.data.click_log import ClickLog, Split
from embcompress.deployment import deploy
from embcompress.methods import Method
from embcompress.models import MODELS, ClickModel
from embcompress.recipe import (
    OverfittingGuard,
    binary_step,
    initialize_tables,
    make_optimizer,
)
from embcompress.training import TrainingProcedure

_EVALUATION_ROWS = 8192
#: Called after every few steps with (epoch, share of the epoch done, examples a second).
StepObserver = Callable[[int, float, float], None]


@dataclass(frozen=True)
class Score:
    """Quality of predictions: area under the ROC curve, and mean log-loss in nats."""

    auc: float
    logloss: float


@dataclass
class Trained:
    """A trained model: what it scored after each epoch, and the weights worth keeping.

    Attributes:
        guard: weights after the first and after the epoch with the best validation AUC.
        validation: score after each epoch.
        prequential: of a prequential run, the score of the test rows, each of them predicted
            before it was trained on.
    """

    model: nn.Module
    learning_rate: float
    guard: OverfittingGuard
    validation: list[Score] = field(default_factory=list)
    train_seconds: float = 0.0
    examples: int = 0
    prequential: Score | None = None

    @property
    def best_epoch(self) -> int:
        """The epoch with the best validation AUC, from 1."""
        return self.guard.best_epoch

    @property
    def best_auc(self) -> float:
        """Validation AUC of the best epoch."""
        return max(self.guard.scores)

    def end_epoch(self, score: Score) -> bool:
        """Take note of an epoch; returns whether to stop."""
        self.validation.append(score)
        return self.guard.end_epoch(self.model, score.auc)


def count_ids(log: ClickLog, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """How often each id of each feature occurs in the rows: (num_embeddings,) int64."""
    counts = {f.name: torch.zeros(f.num_embeddings, dtype=torch.int64) for f in log.features}
    for start in range(0, len(rows), _EVALUATION_ROWS):
        batch = log.batch(rows[start : start + _EVALUATION_ROWS])
        size = (len(batch.offsets) - 1) // len(log.features)
        for number, feature in enumerate(log.features):
            first, last = batch.offsets[number * size], batch.offsets[(number + 1) * size]
            ids = batch.ids[int(first) : int(last)].long()
            counts[feature.name].index_add_(0, ids, torch.ones_like(ids))
    return counts


def build_model(
    log: ClickLog,
    settings: TrainingSettings,
    method: str | Method,
    budget: str,
    seed: int,
    counts: Mapping[str, Tensor] | None = None,
) -> ClickModel:
    """The model of the settings over one table a feature.

    The same seed gives the layers the same start values whatever the tables are.

    Args:
        counts: of the ids of each feature in the training rows; methods that treat frequent ids
            better need them.

    Raises:
        BudgetError: the method cannot meet the budget for these tables.
    """
    tables = [
        TableConfig(
            f"t_{f.name}",
            f.num_embeddings,
            settings.embedding_dim,
            (f.name,),
            counts=None if counts is None else counts[f.name],
        )
        for f in log.features
    ]
    torch.manual_seed(seed)
    collection = EmbeddingBagCollection(tables, method=method, budget=budget, seed=seed)
    initialize_tables(collection, settings.table_std)
    torch.manual_seed(seed)  # tables take more or fewer random numbers, by their method
    return MODELS[settings.model](collection, len(log.dense_names))


def predict(model: nn.Module, log: ClickLog, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Click probabilities of the rows, in their order."""
    model.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(rows), _EVALUATION_ROWS):
            batch = log.batch(rows[start : start + _EVALUATION_ROWS])
            parts.append(torch.sigmoid(model(batch.dense, batch.ids, batch.offsets)))
    return torch.cat(parts).numpy()


def evaluate(model: nn.Module, log: ClickLog, rows: NDArray[np.int64]) -> Score:
    """AUC and log-loss of the rows.

    Raises:
        ValueError: all rows have the same label: there is no AUC.
    """
    return score(log.labels[rows], predict(model, log, rows).astype(np.float64))


def score(label: NDArray[np.uint8], probability: NDArray[np.float64]) -> Score:
    """AUC and log-loss of predictions.

    Raises:
        ValueError: all labels are the same: there is no AUC.
    """
    from sklearn.metrics import log_loss, roc_auc_score

    if label.min() == label.max():
        raise ValueError(
            f"all {len(label)} rows to be evaluated have the label {label[0]}, so there is no AUC; "
            "use more rows, or another split"
        )
    if not np.isfinite(probability).all():  # a learning rate too far: the worst score there is
        return Score(0.0, float("inf"))
    return Score(
        float(roc_auc_score(label, probability)), float(log_loss(label, probability, labels=[0, 1]))
    )


def train(
    model: nn.Module,
    log: ClickLog,
    split: Split,
    settings: TrainingSettings,
    learning_rate: float,
    seed: int,
    observe: StepObserver | None = None,
) -> Trained:
    """Train until the validation AUC stops rising; test rows are not touched."""
    trained = Trained(model, learning_rate, OverfittingGuard(settings.patience))
    optimizer = make_optimizer(model, learning_rate)
    procedure = TrainingProcedure(model, optimizer)
    rng = np.random.default_rng(seed)
    for epoch in range(1, settings.epochs + 1):
        rows = split.train if settings.split == "time" else rng.permutation(split.train)
        started = time.perf_counter()
        _train_epoch(model, log, rows, settings.batch_size, optimizer, procedure, epoch, observe)
        trained.train_seconds += time.perf_counter() - started
        trained.examples += len(rows)
        if trained.end_epoch(evaluate(model, log, split.validation)):
            break
    procedure.close()
    return trained


def _train_epoch(
    model: nn.Module,
    log: ClickLog,
    rows: NDArray[np.int64],
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    procedure: TrainingProcedure,
    epoch: int,
    observe: StepObserver | None,
) -> None:
    model.train()
    started = last = time.perf_counter()
    for start in range(0, len(rows), batch_size):
        batch = log.batch(rows[start : start + batch_size])
        binary_step(optimizer, model(batch.dense, batch.ids, batch.offsets), batch.label)
        procedure.step()
        now = time.perf_counter()
        if observe is not None and now - last > 0.2:
            done = min(start + batch_size, len(rows))
            observe(epoch, done / len(rows), done / (now - started))
            last = now


def deployed(trained: Trained, epoch: int) -> nn.Module:
    """A copy of the model as it was after that epoch, as it would be served."""
    trained.guard.restore(trained.model, epoch)
    return deploy(copy.deepcopy(trained.model))


def test_scores(trained: Trained, log: ClickLog, rows: NDArray[np.int64]) -> dict[int, Score]:
    """Test scores of the deployed model after the first and the best epoch.

    This is the one look at the test rows; a prequential run has scored them on its way.
    """
    if trained.prequential is not None:
        return {trained.best_epoch: trained.prequential}
    return {epoch: evaluate(deployed(trained, epoch), log, rows) for epoch in trained.guard.states}


def finite(value: float) -> float | None:
    """The number, or None (JSON's null) where a training diverged."""
    return value if math.isfinite(value) else None


def validation_record(trained: Trained) -> list[dict[str, float | None]]:
    """Validation scores as JSON objects, an epoch each."""
    return [{"auc": score.auc, "logloss": finite(score.logloss)} for score in trained.validation]
