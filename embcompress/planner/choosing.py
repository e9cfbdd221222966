"""Which of some plans a model learns best with, by short trainings."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from embcompress.budget import BudgetError
from embcompress.methods.base import Method
from embcompress.planner.progress import Show, silent
from embcompress.planner.ranking import Ranking
from embcompress.planner.trial_data import TrialData, full_passes
from embcompress.planner.trials import LEARNING_RATES, Build, Trial, full_training

#: Shares of a training after which the worse half of the plans is left out, but for so many; the
#: best guess stays to the end, because a short training says least of what learns slowly.
_RUNGS = (1 / 8, 1 / 4, 1 / 2)
_FEWEST = 3
#: Earlier parts of the examples by which the winner has to beat the best guess again, at most.
_CONFIRMATIONS = 3
#: Standard errors of its lead on the examples that chose it, where there was no time for others.
_ERRORS_AHEAD = 2.5


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
    first = trials[0]
    winner = max(found, key=lambda trial: found[trial].auc, default=first)
    if winner is not first:
        show("the best plan against the closed forms' choice, on earlier examples")
        known = found[winner].lead(found[first])
        is_better = confirm(winner, first, known, build, data, end)
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


def _rank(trial: Trial) -> tuple[float, float]:
    return -trial.passes, -trial.auc


def confirm(
    challenger: Trial,
    first: Trial,
    known: tuple[float, float],
    build: Build,
    data: TrialData,
    end: float,
) -> bool:
    """Whether the challenger beats the first on earlier examples, too; its lead there is noted.

    Both are trained on ever fewer of the examples, up to three times, and compared by those that
    follow. The mean of these leads and of the known one must be more than its standard error: that
    of the draw of the examples, or that which the leads show, if it is larger, because trainings
    have a noise of their own. A part for which there was no time does not count; if there was time
    for none, the known lead must be 2.5 standard errors.

    Args:
        known: lead on the examples that chose the challenger, and its standard error.
    """
    leads, errors = [known[0]], [known[1]]
    earlier = data.earlier()
    while earlier is not None and len(leads) <= _CONFIRMATIONS:
        one, other = (
            full_training(each.method, build, earlier, end, learning_rate=each.learning_rate)
            for each in (challenger, first)
        )
        if one is None or other is None:
            break
        lead, error = one.lead(other)
        leads.append(lead)
        errors.append(error)
        challenger.lead = statistics.fmean(leads[1:])
        earlier = earlier.earlier()
    if challenger.lead is None:
        return known[0] > _ERRORS_AHEAD * known[1]
    error = max(statistics.fmean(errors), statistics.stdev(leads)) / math.sqrt(len(leads))
    return statistics.fmean(leads) > error


def training_order(data: TrialData) -> list[int]:
    """Numbers of the training batches, in the order of trainings that are cut short.

    Every so many of them first, then those between: so the first part of a training sees all times
    of a log in time order, and ends with the latest, by which it is compared.
    """
    count = len(data.training)
    slices = min(count, max(1, round(1 / (_RUNGS[0] * full_passes(data)))))
    return [batch for first in range(slices) for batch in range(first, count, slices)]
