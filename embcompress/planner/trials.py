"""Short trainings that tell which of some plans a model learns best with."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from embcompress.budget import BudgetError
from embcompress.methods.base import Method
from embcompress.planner.progress import Show, silent
from embcompress.planner.ranking import Ranking
from embcompress.procedures.phases import Phase
from embcompress.training.recipe import binary_step, make_optimizer, validation_step
from embcompress.training.training_procedure import TrainingProcedure

#: What a model is called with (a tensor, a tuple of arguments, a dict of named ones), and labels.
Example = tuple[Any, Tensor]
#: Examples that are tried on, at most: so many that a training takes seconds.
MOST_EXAMPLES = 1 << 19
_HELD_OUT = 0.1
#: Of Adagrad; the last one where it is clearly better for the full tables.
LEARNING_RATES = (0.03, 0.1)
#: Of the random numbers of trials: not the model's, so that all seeds get one plan for one data.
TRIAL_SEED = 0
#: Passes over the training examples, at most, and examples that a training sees altogether, unless
#: one pass is more.
_PASSES, _MOST_SEEN = 4, 1 << 19
#: Shares of a training after which the worse half of the plans is left out, but for so many; the
#: best guess stays to the end, because a short training says least of what learns slowly.
_RUNGS = (1 / 8, 1 / 4, 1 / 2)
_FEWEST = 3
#: Earlier parts of the examples by which the winner has to beat the best guess again, at most.
_CONFIRMATIONS = 6
#: So many standard errors are a clear lead.
_ERRORS_AHEAD = 2.5


def first_batches(data: Iterable[Example], max_examples: int = MOST_EXAMPLES) -> list[Example]:
    """So many of the batches as have the first ``max_examples``, with labels as floats.

    Raises:
        TypeError: batches that are not pairs.
        ValueError: no batches.
    """
    batches: list[Example] = []
    count = 0
    for batch in data:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                "data must yield pairs (inputs, labels); inputs are a tensor, a tuple of the "
                f"model's arguments or a dict of named ones; got {type(batch).__name__}"
            )
        inputs, labels = batch
        batches.append((inputs, torch.as_tensor(labels).float()))
        count += batches[-1][1].numel()
        if count >= max_examples:
            break
    if not batches:
        raise ValueError("data yields no batches; give a loader, or an iterator not used up yet")
    return batches


@dataclass(frozen=True)
class TrialData:
    """Batches to try plans on.

    Attributes:
        training: batches to train on.
        validation: later batches, to compare by.
        is_prequential: whether the model will be trained on every example once, in their order, and
            is compared by what it says of each before. Then whole trainings are compared by the
            second half of all examples so.
    """

    training: list[Example]
    validation: list[Example]
    is_prequential: bool = False

    @classmethod
    def of(cls, data: Iterable[Example], max_examples: int = MOST_EXAMPLES) -> TrialData:
        """The first batches of ``data``; the last tenth of them is held out.

        Raises:
            TypeError: batches that are not pairs.
            ValueError: fewer than two batches, or held-out labels that are all alike.
        """
        batches = first_batches(data, max_examples)
        if len(batches) < 2:
            raise ValueError(f"data must yield at least 2 batches, got {len(batches)}")
        held_out = max(1, round(len(batches) * _HELD_OUT))
        result = cls(batches[:-held_out], batches[-held_out:])
        labels = result.held_out_labels
        if labels.min() == labels.max():
            raise ValueError(
                f"all {labels.numel()} held-out labels are {labels[0].item():g}; give more data, "
                "or shuffle it"
            )
        return result

    def hold_out(self) -> TrialData:
        """The training batches alone, the last tenth of them held out for a method's own search."""
        held_out = max(1, round(len(self.training) * _HELD_OUT))
        return TrialData(self.training[:-held_out] or self.training, self.training[-held_out:])

    def earlier(self) -> TrialData | None:
        """The examples before the held-out ones, of which the last as many batches are held out.

        Whether batches come in time order or not, no training sees what is later than the
        examples that it is compared by. None where too few batches are left, or held-out labels
        are all alike.
        """
        count = len(self.validation)
        result = replace(self, training=self.training[:-count], validation=self.training[-count:])
        if len(result.training) < count:
            return None
        labels = result.held_out_labels
        return result if labels.min() < labels.max() else None

    @property
    def held_out_labels(self) -> Tensor:
        """(N,) labels of the held-out examples."""
        return torch.cat([labels.reshape(-1) for _, labels in self.validation]).cpu()

    @property
    def examples(self) -> int:
        """Number of examples to train on."""
        return sum(labels.numel() for _, labels in self.training)


def training_order(data: TrialData) -> list[int]:
    """Numbers of the training batches, in the order of trainings that are cut short.

    Every so many of them first, then those between: so the first part of a training sees all times
    of a log in time order, and ends with the latest, by which it is compared.
    """
    count = len(data.training)
    slices = min(count, max(1, round(1 / (_RUNGS[0] * full_passes(data)))))
    return [batch for first in range(slices) for batch in range(first, count, slices)]


def full_passes(data: TrialData, most: int = _PASSES) -> int:
    """Passes of a training that is not cut short: fewer, the more examples there are.

    Whole ones: the first examples that are seen again are overfitted first.
    """
    return min(most, max(1, _MOST_SEEN // data.examples))


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
        passes: over the training batches, after which it was evaluated last.
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


def distinct(methods: Sequence[Method], plans: Callable[[Method], object]) -> list[Method]:
    """The methods that can meet the budget, with other plans than those before them.

    Raises:
        BudgetError: none can.
    """
    first: dict[object, Method] = {}
    failure: BudgetError | None = None
    for method in methods:
        try:
            first.setdefault(plans(method), method)
        except BudgetError as error:
            failure = failure or error
    if not first and failure is not None:
        raise failure
    return list(first.values())


def choose(
    methods: Sequence[Method],
    build: Build,
    data: TrialData,
    seconds: float,
    show: Show = silent,
    learning_rate: float = LEARNING_RATES[0],
) -> list[Trial]:
    """Which of some plans a model learns best with: the first, unless another is clearly better.

    The better half goes on to more passes each time (Jamieson & Talwalkar, "Non-stochastic best
    arm identification and hyperparameter optimization", AISTATS 2016, algorithm 1). The last few
    are trained anew, in the order of the data and as long as the AUC rises. What wins so is mostly
    the luckiest of those that are alike. So it has to win against the first again on examples that
    did not choose it (:func:`confirm`): what cannot be told apart stays as it is.

    Args:
        methods: to be tried; the first is the best guess, and is never left out.
        build: makes a model with tables of that method.
        data: what they are trained on and compared by.
        seconds: trainings end after so long; those that were not finished do not count, nor do
            others of as many passes. As long as the time is enough the result does not depend on
            how fast the machine is.
        show: is told what is being done.
        learning_rate: of all trainings.

    Returns:
        All of them, the chosen one first, then those that came further before the others.
    """
    end = time.monotonic() + seconds
    trials = [Trial(method, learning_rate) for method in methods]
    found = _finish(_halve(trials, build, data, end, show), build, data, end, show)
    first, winner = trials[0], _plainest(found) if found else trials[0]
    if winner is not first:
        show("the best plan against the closed forms' choice, on earlier examples")
        is_better = confirm(winner, first, build, data, end)
        if is_better is None:
            lead, error = found[winner].lead(found[first])
            is_better = lead > _ERRORS_AHEAD * error
        winner = winner if is_better else first
    return sorted(trials, key=lambda trial: (trial is not winner, *_rank(trial)))


def _halve(
    trials: Sequence[Trial],
    build: Build,
    data: TrialData,
    end: float,
    show: Show,
) -> dict[Trial, Ranking]:
    """The plans that are left after the last round that there was time for, in their order."""
    alive, found = list(trials), {}
    for share in _RUNGS:
        passes = share * full_passes(data)
        for number, trial in enumerate(alive, 1):
            show(f"plan {number} of {len(alive)}, trained for {passes:.3g} passes")
            trial.train(build, data, passes, end, training_order(data))
        if any(trial.passes < passes for trial in alive):
            break
        better = sorted(alive, key=_rank)[: max(_FEWEST, len(alive) // 2)]
        alive = [trial for trial in alive if trial in better or trial is trials[0]]
        found = {trial: trial.ranking for trial in alive if trial.ranking is not None}
        for trial in trials:
            if trial not in alive:
                trial.end()
    for trial in trials:
        trial.end()
    return found


def _finish(
    found: dict[Trial, Ranking],
    build: Build,
    data: TrialData,
    end: float,
    show: Show,
) -> dict[Trial, Ranking]:
    """The same after whole trainings in the order of the data, if there was time for all."""
    finished: dict[Trial, Ranking] = {}
    for number, trial in enumerate(found, 1):
        show(f"plan {number} of {len(found)}, trained to the end")
        ranking = full_training(trial.method, build, data, end, learning_rate=trial.learning_rate)
        if ranking is None:
            return found
        finished[trial] = ranking
    for trial, ranking in finished.items():
        trial.ranking, trial.passes = ranking, full_passes(data)
    return finished


def _plainest(found: dict[Trial, Ranking]) -> Trial:
    """The best, or the first of those that are hardly worse, but for the best guess.

    Within a standard error of the best (Breiman et al., "Classification and regression trees",
    1984, section 3.4.3): a plan far from the best guess needs a reason.
    """
    first, *others = found
    best = max(found, key=lambda trial: found[trial].auc)
    if best is first:
        return first
    for trial in others:
        lead, error = found[best].lead(found[trial])
        if lead <= error:
            return trial
    return best


def _rank(trial: Trial) -> tuple[float, float]:
    return -trial.passes, -trial.auc


def confirm(
    challenger: Trial,
    first: Trial,
    build: Build,
    data: TrialData,
    end: float,
) -> bool | None:
    """Whether the challenger beats the first on earlier examples, too; its lead is noted.

    Both are trained on ever fewer of the examples, up to six times, and compared by those that
    follow. The mean lead must be more than its standard error: that of the draw of the examples,
    or that which the leads show, if it is larger, because trainings have a noise of their own. A
    part for which there was no time does not count; None if there was time for none.
    """
    leads: list[float] = []
    errors: list[float] = []
    known = math.inf
    earlier = data.earlier()
    while earlier is not None and len(leads) < _CONFIRMATIONS:
        one, other = (
            full_training(each.method, build, earlier, end, learning_rate=each.learning_rate)
            for each in (challenger, first)
        )
        if one is None or other is None:
            break
        lead, error = one.lead(other)
        leads.append(lead)
        errors.append(error)
        challenger.lead = statistics.fmean(leads)
        deviation = statistics.stdev(leads) if len(leads) > 1 else 0.0
        known = max(statistics.fmean(errors), deviation) / math.sqrt(len(leads))
        if len(leads) >= _FEWEST and abs(challenger.lead) > _ERRORS_AHEAD * known:
            break
        earlier = earlier.earlier()
    return None if challenger.lead is None else challenger.lead > known


def full_training(
    method: Method,
    build: Build,
    data: TrialData,
    end: float,
    most_passes: int = _PASSES,
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


def _prequential_training(
    trial: Trial, build: Build, data: TrialData, end: float
) -> Ranking | None:
    """Of the second half of all examples, each ranked before it was trained on."""
    batches = [*data.training, *data.validation]
    outputs: list[Tensor] = []
    trial.train(build, replace(data, training=batches), 1.0, end, outputs=outputs)
    if trial.passes < 1.0:
        return None
    half = len(batches) // 2
    labels = torch.cat([labels.reshape(-1) for _, labels in batches[half:]])
    return Ranking.of(torch.cat(outputs[half:]).double().cpu().numpy(), labels.numpy() > 0.5)


def standard_error(data: TrialData) -> float:
    """Of the AUC of predictions for the held-out labels that are little better than chance.

    Source: Hanley & McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982,
    at an area of 1/2; it falls for larger areas.
    """
    labels = data.held_out_labels
    positive = int((labels > 0.5).sum())
    negative = labels.numel() - positive
    return math.sqrt((positive + negative + 1) / (12 * positive * negative))
