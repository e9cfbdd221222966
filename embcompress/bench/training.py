"""Training one model on one click log: the loop that every method shares."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embcompress.approximation.co_occurrence import CoOccurrence, Occurrences, add_company
from embcompress.bench.settings import TrainingSettings
from embcompress.budget import Budget
from embcompress.collection import EmbeddingBagCollection, TableConfig
from embcompress.data.click_log import Batch, ClickLog, Split
from embcompress.deployment import deploy
from embcompress.memory import memory
from embcompress.methods import Method
from embcompress.models import MODELS, ClickModel
from embcompress.plan import LookupPlan
from embcompress.procedures.phases import Phase
from embcompress.procedures.phases import Score as PhaseScore
from embcompress.tables.compressed_table import CompressedTable
from embcompress.training.recipe import (
    OverfittingGuard,
    binary_step,
    initialize_tables,
    make_optimizer,
    validation_step,
)
from embcompress.training.training_procedure import TrainingProcedure

_EVALUATION_ROWS = 8192
#: Rows that are looked at for what ids occur with: every pair of features costs.
_CO_OCCURRENCE_ROWS = 1 << 20
#: Called after every few steps with (epoch, share of the epoch done, examples a second).
StepObserver = Callable[[int, float, float], None]


@dataclass(frozen=True)
class Score:
    """Quality of predictions: area under the ROC curve, and mean log-loss in nats."""

    auc: float
    logloss: float


@dataclass
class PhaseRecord:
    """A phase of training: its name, its epochs, and the bytes of tables beyond the deployed."""

    name: str
    epochs: int = 0
    training_bytes: int = 0


@dataclass
class Trained:
    """A trained model: what it scored after each epoch, and the weights worth keeping.

    Attributes:
        guard: weights after the first and after the epoch with the best validation AUC.
        validation: score after each epoch (of the last phase, where there are several).
        phases: what was run.
        prequential: of a prequential run, the score of the test rows, each of them predicted
            before it was trained on.
    """

    model: nn.Module
    learning_rate: float
    guard: OverfittingGuard
    validation: list[Score] = field(default_factory=list)
    phases: list[PhaseRecord] = field(default_factory=list)
    train_seconds: float = 0.0
    examples: int = 0
    prequential: Score | None = None
    over_time: list[Score | None] = field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        """The epoch with the best validation AUC, from 1."""
        return self.guard.best_epoch

    @property
    def training_bytes(self) -> int:
        """The most that tables held in any phase beyond what is deployed."""
        return max(phase.training_bytes for phase in self.phases)

    @property
    def diverged(self) -> bool:
        """Whether no epoch gave predictions that are numbers."""
        return not any(math.isfinite(score.logloss) for score in self.validation)

    @property
    def best_auc(self) -> float:
        """Validation AUC of the best epoch."""
        return max(self.guard.scores)

    def end_epoch(self, score: Score) -> bool:
        """Take note of an epoch; returns whether to stop."""
        self.validation.append(score)
        return self.guard.end_epoch(self.model, score.auc)


def _state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state of those parameters of tables that no kernel updates."""
    tables = [module for module in model.modules() if isinstance(module, CompressedTable)]
    parameters = {parameter for table in tables for parameter in table.parameters()}
    return sum(
        value.untyped_storage().nbytes()
        for parameter in parameters & optimizer.state.keys()
        for value in optimizer.state[parameter].values()
        if isinstance(value, Tensor)
    )


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


def sample_co_occurrence(log: ClickLog, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """For each id of each feature, a sample of the other features' ids in the same rows.

    One pass over the rows, or over as many of them as :data:`_CO_OCCURRENCE_ROWS`, evenly spread.

    Returns:
        (num_embeddings, 16) int64 by feature; see
        :class:`embcompress.approximation.co_occurrence.CoOccurrence`.
    """
    rows = rows[:: max(1, -(-len(rows) // _CO_OCCURRENCE_ROWS))]
    found = {f.name: CoOccurrence(f.num_embeddings) for f in log.features}
    for start in range(0, len(rows), _EVALUATION_ROWS):
        batch = log.batch(rows[start : start + _EVALUATION_ROWS])
        size = (len(batch.offsets) - 1) // len(log.features)
        lengths = batch.offsets.diff()
        row = torch.arange(size).repeat(len(log.features)).repeat_interleave(lengths)
        own = [slice(int(first), int(last)) for first, last in pairwise(batch.offsets[::size])]
        add_company(
            found,
            [
                Occurrences(feature.name, batch.ids[part], row[part])
                for feature, part in zip(log.features, own, strict=True)
            ],
        )
    return {name: each.samples() for name, each in found.items()}


def table_configs(
    log: ClickLog,
    settings: TrainingSettings,
    counts: Mapping[str, Tensor] | None = None,
    co_occurrence: Mapping[str, Tensor] | None = None,
) -> list[TableConfig]:
    """One table a feature; see :func:`build_model`."""
    return [
        TableConfig(
            f"t_{f.name}",
            f.num_embeddings,
            settings.embedding_dim,
            (f.name,),
            counts=None if counts is None else counts[f.name],
            co_occurrence=None if co_occurrence is None else co_occurrence[f.name],
        )
        for f in log.features
    ]


def build_model(
    log: ClickLog,
    settings: TrainingSettings,
    method: str | Method,
    budget: Budget | None,
    seed: int,
    counts: Mapping[str, Tensor] | None = None,
    co_occurrence: Mapping[str, Tensor] | None = None,
    plans: Sequence[LookupPlan] | None = None,
) -> ClickModel:
    """The model of the settings over one table a feature.

    The same seed gives the layers the same start values whatever the tables are.

    Args:
        counts: of the ids of each feature in the training rows; methods that treat frequent ids
            better need them.
        co_occurrence: what the ids of each feature occur with in the training rows
            (:func:`sample_co_occurrence`), for methods that use it.
        plans: of the tables, made by the method before, instead of a budget.

    Raises:
        BudgetError: the method cannot meet the budget for these tables.
    """
    tables = table_configs(log, settings, counts, co_occurrence)
    torch.manual_seed(seed)
    collection = EmbeddingBagCollection(
        tables, method=method, budget=budget, seed=seed, plans=plans
    )
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
    """Train, in the phases of the tables' methods, the last until the validation AUC stops rising.

    Test rows are not touched.
    """
    trained = Trained(model, learning_rate, OverfittingGuard(settings.patience))
    loop = TrainingLoop(trained, log, settings, observe)
    rng = np.random.default_rng(seed)

    def validation_score() -> Score:
        return evaluate(model, log, split.validation)

    for phase in loop.phases(lambda: validation_score().auc):
        is_last = phase == loop.procedure.phases[-1]
        for _ in range(phase.epochs or settings.epochs):
            rows = rng.permutation(split.train) if settings.split == "random" else split.train
            loop.run_epoch(phase, rows, split.validation)
            if is_last and trained.end_epoch(validation_score()):
                break
    return trained


class TrainingLoop:
    """Runs epochs of the phases of a model, and keeps account of them.

    Attributes:
        procedure: what the tables' methods do.
    """

    def __init__(
        self,
        trained: Trained,
        log: ClickLog,
        settings: TrainingSettings,
        observe: StepObserver | None = None,
    ) -> None:
        self.trained, self.log, self.settings, self._observe = trained, log, settings, observe
        self.procedure = TrainingProcedure(trained.model)
        self._optimizer: torch.optim.Optimizer | None = None
        self._epochs = 0

    def phases(self, score: PhaseScore) -> Iterator[Phase]:
        """Every phase, begun and with an optimizer of its own."""
        while True:
            started = time.perf_counter()
            phase = self.procedure.begin_phase(score)
            if phase is None:
                break
            self._optimizer = make_optimizer(self.trained.model, self.trained.learning_rate)
            self.procedure.attach(self._optimizer)
            self.trained.train_seconds += time.perf_counter() - started
            self.trained.phases.append(PhaseRecord(phase.name))
            self._note_memory()
            yield phase
        self.procedure.close()

    def run_epoch(
        self,
        phase: Phase,
        rows: NDArray[np.int64],
        validation: NDArray[np.int64],
        probability: NDArray[np.float32] | None = None,
    ) -> None:
        """Train on rows in their order, beside validation rows where the phase wants them.

        Args:
            validation: in time order or in any; again from the start when all were shown.
            probability: (rows,) filled with the prediction of each row before its step.
        """
        assert self._optimizer is not None
        model, procedure, size = self.trained.model, self.procedure, self.settings.batch_size
        self._epochs += 1
        shown = self._endless(validation) if phase.split == "validation" else None
        model.train()
        started = last = time.perf_counter()
        for start in range(0, len(rows), size):
            end = min(start + size, len(rows))
            batch = self.log.batch(rows[start:end])
            logits = model(batch.dense, batch.ids, batch.offsets)
            if probability is not None:
                probability[start:end] = torch.sigmoid(logits.detach()).numpy()
            binary_step(self._optimizer, logits, batch.label)
            if shown is not None:
                self._show(next(shown))
            procedure.step()
            now = time.perf_counter()
            if self._observe is not None and now - last > 0.2:
                self._observe(self._epochs, end / len(rows), end / (now - started))
                last = now
        self.trained.train_seconds += time.perf_counter() - started
        self.trained.examples += len(rows)
        self.trained.phases[-1].epochs += 1
        self._note_memory()

    def _note_memory(self) -> None:
        """Keep the most that tables hold for training, now that state of optimizers is there."""
        model, phase = self.trained.model, self.trained.phases[-1]
        assert self._optimizer is not None
        held = memory(model).training + _state_bytes(model, self._optimizer)
        phase.training_bytes = max(phase.training_bytes, held)

    def _endless(self, rows: NDArray[np.int64]) -> Iterator[Batch]:
        """Batches of the rows, shuffled anew for every pass over them."""
        rng = np.random.default_rng(self._epochs)
        while True:
            shuffled = rng.permutation(rows)
            for start in range(0, len(rows), self.settings.batch_size):
                yield self.log.batch(shuffled[start : start + self.settings.batch_size])

    def _show(self, batch: Batch) -> None:
        model = self.trained.model
        validation_step(
            self.procedure, lambda: model(batch.dense, batch.ids, batch.offsets), batch.label
        )


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
