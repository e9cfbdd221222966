"""Short trainings that tell which of some plans a model learns best with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from embcompress.methods.base import Method
from embcompress.recipe import binary_step, make_optimizer
from embcompress.training import TrainingProcedure

#: What a model is called with (a tensor, a tuple of arguments, a dict of named ones), and labels.
Example = tuple[Any, Tensor]
_HELD_OUT = 0.1
_LEARNING_RATE = 0.03  # of Adagrad
#: Passes over the training examples after which the worse half of the candidates is left out.
_RUNGS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class TrialData:
    """Batches to try plans on.

    Attributes:
        training: batches to train on.
        validation: later batches, to compare by.
    """

    training: list[Example]
    validation: list[Example]

    @classmethod
    def of(cls, data: Iterable[Example], max_examples: int) -> TrialData:
        """The first batches of ``data``; the last tenth of them is held out.

        Raises:
            ValueError: fewer than two batches, or batches that are not pairs.
        """
        batches: list[Example] = []
        count = 0
        for batch in data:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise ValueError(
                    "data must yield pairs (inputs, labels); inputs are a tensor, a tuple of the "
                    f"model's arguments or a dict of named ones; got {type(batch).__name__}"
                )
            inputs, labels = batch
            batches.append((inputs, torch.as_tensor(labels).float()))
            count += batches[-1][1].numel()
            if count >= max_examples:
                break
        if len(batches) < 2:
            raise ValueError(f"data must yield at least 2 batches, got {len(batches)}")
        held_out = max(1, round(len(batches) * _HELD_OUT))
        return cls(batches[:-held_out], batches[-held_out:])


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


@dataclass(eq=False)
class Candidate:
    """A plan that is being tried.

    Attributes:
        method: what makes the plan.
        auc: on the held-out batches, the best after any rung.
        passes: over the training batches.
        head_start: is added to its AUC where candidates are compared.
    """

    method: Method
    auc: float = 0.0
    passes: float = 0.0
    head_start: float = 0.0
    _model: nn.Module | None = field(default=None, repr=False)
    _optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)
    _procedure: TrainingProcedure | None = field(default=None, repr=False)

    def train(self, build: Callable[[Method], nn.Module], data: TrialData, passes: float) -> None:
        """Go on to so many passes, and evaluate."""
        if self._model is None:
            self._model = build(self.method)
            self._optimizer = make_optimizer(self._model, _LEARNING_RATE)
            self._procedure = TrainingProcedure(self._model, self._optimizer)
        assert self._optimizer is not None and self._procedure is not None
        count = len(data.training)
        first, last = round(self.passes * count), round(passes * count)
        self._model.train()
        for batch in range(first, last):
            inputs, labels = data.training[batch % count]
            logits = call_model(self._model, inputs)
            binary_step(self._optimizer, logits.reshape(-1), labels.reshape(-1))
            self._procedure.step()
        self.passes = passes
        self.auc = max(self.auc, area_under_curve(self._model, data.validation))

    def end(self) -> None:
        """Let the model go."""
        self._model = self._optimizer = self._procedure = None


@torch.no_grad()
def area_under_curve(model: nn.Module, batches: Sequence[Example]) -> float:
    """Area under the ROC curve of the model's outputs; 0 where they are not finite.

    Raises:
        ValueError: all labels are alike.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plans are compared by scikit-learn's roc_auc_score: pip install 'embcompress[bench]'"
        ) from error
    model.eval()
    outputs = torch.cat([call_model(model, inputs).reshape(-1) for inputs, _ in batches]).cpu()
    labels = torch.cat([labels.reshape(-1) for _, labels in batches]).cpu()
    if labels.min() == labels.max():
        raise ValueError(
            f"all {labels.numel()} held-out labels are {labels[0].item():g}; give more data, or "
            "shuffle it"
        )
    if not outputs.isfinite().all():
        return 0.0
    return float(roc_auc_score(labels.numpy(), outputs.numpy()))


def distinct(methods: Sequence[Method], plans: Callable[[Method], object]) -> list[Method]:
    """The methods that make other plans than those before them."""
    first: dict[object, Method] = {}
    for method in methods:
        first.setdefault(plans(method), method)
    return list(first.values())


def successive_halving(
    methods: Sequence[Method],
    build: Callable[[Method], nn.Module],
    data: TrialData,
    seconds: float,
) -> list[Candidate]:
    """Try plans on more and more examples, the better half of them each time.

    Source: Jamieson & Talwalkar, "Non-stochastic best arm identification and hyperparameter
    optimization", AISTATS 2016, algorithm 1.

    Args:
        methods: to be tried; the first is the best guess, and has a head start of one standard
            error of an AUC: what is not told apart stays as it is, whatever the seed.
        build: makes a model with tables of that method; its own random numbers, the same each
            time.
        data: what they are trained on and compared by.
        seconds: no further training is begun after so long. Below that the result does not depend
            on how fast the machine is.

    Returns:
        All candidates, best first: those that came further are better.
    """
    started = time.monotonic()
    candidates = [Candidate(method) for method in methods]
    alive = candidates
    candidates[0].head_start = standard_error(
        torch.cat([y.reshape(-1) for _, y in data.validation])
    )
    for passes in _RUNGS:
        for candidate in alive:
            candidate.train(build, data, passes)
            if time.monotonic() - started > seconds:
                break
        alive = sorted(alive, key=_rank)[: (len(alive) + 1) // 2]
        for candidate in candidates:
            if candidate not in alive:
                candidate.end()
        if len(alive) == 1 or time.monotonic() - started > seconds:
            break
    for candidate in alive:
        candidate.end()
    return sorted(candidates, key=_rank)


def _rank(candidate: Candidate) -> tuple[float, float]:
    return -candidate.passes, -candidate.auc - candidate.head_start


def standard_error(labels: Tensor) -> float:
    """Of the AUC of predictions for these labels that are little better than chance.

    Source: Hanley & McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982,
    at an area of 1/2; it falls for larger areas.
    """
    positive = int(labels.sum())
    negative = labels.numel() - positive
    return math.sqrt((positive + negative + 1) / (12 * max(1, positive) * max(1, negative)))
