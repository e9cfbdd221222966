"""Short trainings of a model with other tables."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from embcompress.methods.base import Method
from embcompress.planner.ranking import Ranking
from embcompress.planner.trial_data import MOST_PASSES, Example, TrialData, full_passes
from embcompress.procedures.phases import Phase
from embcompress.training.recipe import binary_step, make_optimizer, validation_step
from embcompress.training.training_procedure import TrainingProcedure

#: Of Adagrad; the last one where it is clearly better for the full tables.
LEARNING_RATES = (0.03, 0.1)
#: Of the random numbers of trials: not the model's, so that all seeds get one plan for one data.
TRIAL_SEED = 0


def call_model(model: nn.Module, inputs: Any) -> Tensor:
    """The model's output for one batch."""
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, tuple | list):
        output = model(*inputs)
    else:
        output = model(inputs)
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return a tensor of logits, got {type(output).__name__}")
    return output


#: Makes the model with tables of a method, which know how often ids occur among the examples to be
#: trained on; its own random numbers, the same each time.
Build = Callable[[Method, TrialData], nn.Module]


@dataclass(eq=False)
class Trial:
    """A plan that is being tried.

    Attributes:
        method: what makes the plan.
        learning_rate: of its training.
        ranking: of the held-out examples, the best after any number of passes.
        passes: over the training batches, after which it was evaluated last; of a training to the
            end so many as it may have, whether or not the AUC rose as long.
        lead: of its AUC over the best guess's on earlier examples, on average; None where it was
            not compared there.
        model: while it is trained.
    """

    method: Method
    learning_rate: float = LEARNING_RATES[0]
    ranking: Ranking | None = field(default=None, repr=False)
    passes: float = 0.0
    lead: float | None = None
    model: nn.Module | None = field(default=None, repr=False)
    _optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)
    _procedure: TrainingProcedure | None = field(default=None, repr=False)
    _shown: Iterator[Example] = field(default=iter(()), repr=False)

    @property
    def auc(self) -> float:
        """On the held-out examples; 0 before the first pass."""
        return 0.0 if self.ranking is None else self.ranking.auc

    def train(
        self,
        build: Build,
        data: TrialData,
        passes: float,
        end: float,
        order: Sequence[int] | None = None,
        outputs: list[Tensor] | None = None,
    ) -> None:
        """Go on to so many passes, and evaluate; give up when the time is past ``end``.

        Where the method has several phases, all but the last are run before the first pass.

        Args:
            order: numbers of the training batches; None for that of the data.
            outputs: is given the model's of every batch before it was trained on.
        """
        count = len(data.training)
        order = range(count) if order is None else order
        if self.model is None:
            self.model = build(self.method, data)
            self._procedure = TrainingProcedure(self.model)
            held_out = data.hold_out()
            while (phase := self._begin_phase(held_out)) != self._procedure.phases[-1]:
                for batch in range((phase.epochs or 1) * len(held_out.training)):
                    if time.monotonic() > end:
                        return
                    self._step(phase, held_out.training[batch % len(held_out.training)])
        assert self._procedure is not None and self._procedure.phase is not None
        self.model.train()
        for batch in range(round(self.passes * count), round(passes * count)):
            if time.monotonic() > end:
                return
            output = self._step(self._procedure.phase, data.training[order[batch % count]])
            if outputs is not None:
                outputs.append(output)
        self.passes = passes
        now = ranking(self.model, data)
        if self.ranking is None or now.auc > self.ranking.auc:
            self.ranking = now

    def _begin_phase(self, data: TrialData) -> Phase:
        """The next phase, which chooses by the validation batches of ``data``."""
        model, procedure = self.model, self._procedure
        assert model is not None and procedure is not None
        phase = procedure.begin_phase(lambda: ranking(model, data).auc)
        assert phase is not None
        self._optimizer = make_optimizer(model, self.learning_rate)
        procedure.attach(self._optimizer)
        self._shown = itertools.cycle(data.validation)
        model.train()
        return phase

    def _step(self, phase: Phase, batch: Example) -> Tensor:
        model, procedure = self.model, self._procedure
        assert model is not None and procedure is not None and self._optimizer is not None
        inputs, labels = batch
        output = call_model(model, inputs).reshape(-1)
        binary_step(self._optimizer, output, labels.reshape(-1))
        if phase.split == "validation":
            inputs, labels = next(self._shown)
            validation_step(
                procedure, lambda: call_model(model, inputs).reshape(-1), labels.reshape(-1)
            )
        procedure.step()
        return output.detach()

    def end(self) -> None:
        """Let the model go."""
        self.model = self._optimizer = self._procedure = None
        self._shown = iter(())


@torch.no_grad()
def held_out_logits(model: nn.Module, data: TrialData) -> Tensor:
    """(N,) float64 outputs for the held-out examples."""
    model.eval()
    outputs = [call_model(model, inputs).reshape(-1) for inputs, _ in data.validation]
    return torch.cat(outputs).double().cpu()


def log_loss(model: nn.Module, data: TrialData) -> float:
    """Nats a held-out example."""
    logits, labels = held_out_logits(model, data), data.held_out_labels.double()
    return float(nn.functional.binary_cross_entropy_with_logits(logits, labels))


def ranking(model: nn.Module, data: TrialData) -> Ranking:
    """How the model ranks the held-out examples."""
    return Ranking.of(held_out_logits(model, data).numpy(), data.held_out_labels.numpy() > 0.5)


def full_training(
    method: Method,
    build: Build,
    data: TrialData,
    end: float,
    most_passes: int = MOST_PASSES,
    learning_rate: float = LEARNING_RATES[0],
    on_better: Callable[[nn.Module], None] | None = None,
) -> Ranking | None:
    """Of a training that goes on as long as the AUC rises; None if the time ran out.

    Args:
        most_passes: fewer, the more examples there are.
        on_better: called with the model after every pass that made the AUC rise.
    """
    trial, best = Trial(method, learning_rate), -1.0
    if data.is_prequential:
        return _prequential_training(trial, build, data, end)
    for passes in range(1, full_passes(data, most_passes) + 1):
        trial.train(build, data, passes, end)
        if trial.passes < passes:
            return None
        if trial.auc <= best:
            break
        best = trial.auc
        if on_better is not None:
            assert trial.model is not None
            on_better(trial.model)
    return trial.ranking


def best_learning_rate(
    train: Callable[[float], Ranking | None],
) -> tuple[float, Ranking] | None:
    """The first rate, or a later one whose lead is more than a standard error.

    Args:
        train: a training with that rate; None if the time ran out.

    Returns:
        The rate and what came of its training; None if the time ran out in the first one.
    """
    best: tuple[float, Ranking] | None = None
    for learning_rate in LEARNING_RATES:
        found = train(learning_rate)
        if found is None:
            break
        if best is None or found.is_better(best[1]):
            best = learning_rate, found
    return best


def _prequential_training(
    trial: Trial, build: Build, data: TrialData, end: float
) -> Ranking | None:
    """Of the second half of all examples, each ranked before it was trained on."""
    batches = [*data.training, *data.validation]
    outputs: list[Tensor] = []
    one_pass = replace(data, training=batches)
    trial.train(lambda method, _: build(method, data), one_pass, 1.0, end, outputs=outputs)
    if trial.passes < 1.0:
        return None
    half = len(batches) // 2
    labels = torch.cat([labels.reshape(-1) for _, labels in batches[half:]])
    return Ranking.of(torch.cat(outputs[half:]).double().cpu().numpy(), labels.numpy() > 0.5)
