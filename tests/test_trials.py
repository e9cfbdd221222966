"""Short trainings of a model with other tables, and which of some plans they choose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import embcompress as ec
from embcompress.methods.base import Method
from embcompress.planner import choosing, trial_data
from embcompress.planner.choosing import choose, confirm, training_order
from embcompress.planner.ranking import Ranking
from embcompress.planner.trial_data import TrialData, full_passes, standard_error
from embcompress.planner.trials import Trial, full_training, ranking
from tests.click_batches import Model, batches


@pytest.fixture(scope="module")
def data() -> TrialData:
    return TrialData.of(batches())


def test_the_last_tenth_is_held_out(data: TrialData) -> None:
    assert (len(data.training), len(data.validation), data.examples) == (54, 6, 5400)
    assert torch.equal(data.validation[-1][1], batches()[-1][1])
    assert len(TrialData.of(iter(batches()), max_examples=1000).training) == 9


def test_earlier_data_is_compared_by_what_comes_right_after_it(data: TrialData) -> None:
    earlier = data.earlier()
    assert earlier is not None
    assert (len(earlier.training), len(earlier.validation)) == (48, 6)
    assert earlier.training + earlier.validation == data.training
    few = TrialData.of(batches(2))
    assert few.earlier() is None  # nothing is left to train on
    alike = TrialData([*data.training[:5], (None, torch.ones(9))], data.validation[:1])
    assert alike.earlier() is None


def test_the_first_part_of_a_training_sees_all_times(
    data: TrialData, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert full_passes(data) == 4
    assert training_order(data) == [*range(0, 54, 2), *range(1, 54, 2)]
    monkeypatch.setattr(trial_data, "_MOST_SEEN", 2 * data.examples)
    assert full_passes(data) == 2 and training_order(data)[:14] == list(range(0, 54, 4))
    monkeypatch.setattr(trial_data, "_MOST_SEEN", 1)
    assert full_passes(data) == 1 and sorted(training_order(data)) == list(range(54))


def test_data_is_checked() -> None:
    with pytest.raises(TypeError, match="pairs \\(inputs, labels\\)"):
        TrialData.of([torch.zeros(3)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least 2 batches, got 1"):
        TrialData.of(batches(1))
    with pytest.raises(ValueError, match="all 3 held-out labels are 1"):
        TrialData.of([(torch.zeros(3), torch.ones(3))] * 5)


def test_the_error_of_a_lead_is_that_of_other_draws() -> None:
    """Two models that agree mostly: the difference is known better than either AUC."""
    random = np.random.default_rng(0)
    leads, errors, aucs = [], [], []
    for _ in range(400):
        is_positive = random.random(300) < 0.4
        outputs = is_positive + random.normal(size=300)
        one = Ranking.of(outputs + random.normal(0, 0.2, 300), is_positive)
        other = Ranking.of(outputs + random.normal(0, 0.5, 300), is_positive)
        lead, error = one.lead(other)
        assert lead == one.auc - other.auc
        leads.append(lead)
        errors.append(error)
        aucs.append(one.auc)
    assert np.mean(errors) == pytest.approx(np.std(leads), rel=0.1)
    assert np.mean(errors) < 0.6 * np.std(aucs)
    assert one.lead(one) == (0.0, 0.0)


class Outputs(nn.Module):
    def forward(self, outputs: Tensor) -> Tensor:
        return outputs


def test_the_area_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    outputs = torch.randint(0, 9, (500,)).float()  # with many equal ones
    labels = (torch.rand(500) < outputs / 9).float()
    held_out = TrialData([], [(outputs[:200], labels[:200]), (outputs[200:], labels[200:])])
    expected = metrics.roc_auc_score(labels, outputs)
    assert ranking(Outputs(), held_out).auc == pytest.approx(expected)
    assert ranking(Outputs(), TrialData([], [(outputs / 0, labels)])).auc == 0.0
    assert ranking(Outputs(), TrialData([], [(outputs, labels * 0)])).auc == 0.5


def test_the_standard_error_is_that_of_chance() -> None:
    torch.manual_seed(0)
    labels = (torch.rand(400) < 0.3).float()
    areas = [ranking(Outputs(), TrialData([], [(torch.rand(400), labels)])).auc for _ in range(300)]
    expected = standard_error(TrialData([], [(labels, labels)]))
    assert expected == pytest.approx(float(torch.tensor(areas).std()), rel=0.15)


@dataclass(frozen=True)
class Fake(Method):
    """Stands for a plan; its number says how good, and where it errs."""

    number: int = 0
    noise: int = 0

    def sizes(self, table: Any) -> range:
        raise NotImplementedError

    def plan(self, table: Any, size: int) -> Any:
        raise NotImplementedError


class Noisy(nn.Module):
    """Predicts labels, the better the larger the number."""

    def __init__(self, number: int, noise: int = 0) -> None:
        super().__init__()
        self.number, self.noise = number, noise
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, label: Tensor) -> Tensor:
        noise = torch.randn(label.shape, generator=torch.Generator().manual_seed(self.noise))
        return self.weight * (self.number / 10 * label + noise)


def fake_build(method: Method, data: TrialData | None = None) -> nn.Module:
    assert isinstance(method, Fake)
    return Noisy(method.number, method.noise)


@pytest.fixture
def labels() -> TrialData:
    torch.manual_seed(3)
    drawn = [(torch.rand(200) < 0.5).float() for _ in range(20)]
    return TrialData.of([(label, label) for label in drawn])


def test_the_better_half_goes_on_and_the_best_guess_stays(labels: TrialData) -> None:
    methods = [Fake(0), *(Fake(number) for number in (3, 9, 6, 4, 8, 5, 7))]
    tried = choose(methods, fake_build, labels, 60)
    assert [trial.method for trial in tried[:5]] == [Fake(k) for k in (9, 8, 7, 0, 6)]
    assert [trial.passes for trial in tried] == [4, 4, 4, 4, 1, 0.5, 0.5, 0.5]
    assert [trial.lead is not None for trial in tried] == [True] + [False] * 7


def test_the_last_trainings_are_in_the_order_of_the_data(
    labels: TrialData, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = []

    def train(trial: Trial, *details: Any) -> None:
        orders.append(details[4] if len(details) > 4 else None)
        whole(trial, *details)

    whole = Trial.train
    monkeypatch.setattr(Trial, "train", train)
    choose([Fake(1), Fake(9)], fake_build, labels, 60)
    assert orders[:6] == [training_order(labels)] * 6  # two plans, three rounds
    assert set(map(str, orders[6:])) == {"None"}


def test_prequential_data_is_ranked_before_it_is_trained_on() -> None:
    """Every example has an id of its own: nothing is known of it before, and all afterwards."""
    torch.manual_seed(0)
    ids, labels = torch.arange(2000).split(100), (torch.rand(2000) < 0.5).float().split(100)
    data = TrialData.of(zip(ids, labels, strict=True))
    built: list[nn.Module] = []

    def build(method: Method, data: TrialData) -> nn.Module:
        table = nn.Embedding(2000, 1)
        nn.init.zeros_(table.weight)
        built.append(nn.Sequential(table, nn.Flatten(0)))
        return built[-1]

    found = full_training(Fake(), build, replace(data, is_prequential=True), math.inf)
    assert found is not None
    assert len(found.of_positives) + len(found.of_negatives) == 1000  # of the second half
    assert found.auc == 0.5
    assert ranking(built[0], TrialData([], [*data.training, *data.validation])).auc == 1.0
    assert full_training(Fake(), build, replace(data, is_prequential=True), 0.0) is None


def test_the_best_guess_wins_what_cannot_be_told_apart(labels: TrialData) -> None:
    """Two models that are as good, and err in different examples."""
    first, other = (ranking(Noisy(*numbers), labels) for numbers in ((10, 0), (10, 3)))
    assert other.auc > first.auc
    tried = choose([Fake(10, 0), Fake(10, 3)], fake_build, labels, 60)
    assert [trial.method for trial in tried] == [Fake(10, 0), Fake(10, 3)]
    assert tried[1].lead is not None


def test_a_winner_by_luck_is_given_up_where_it_falls_behind(labels: TrialData) -> None:
    challenger, seen = Trial(Fake(3)), []

    def build(method: Method, data: TrialData) -> nn.Module:
        seen.append((method, data.examples))
        return fake_build(method)

    assert not confirm(challenger, Trial(Fake(9)), (0.1, 0.01), build, labels, math.inf)
    assert challenger.lead is not None and challenger.lead < 0
    # Tables know the ids of the part's examples alone.
    assert seen == [(Fake(number), size) for size in (3200, 2800, 2400) for number in (3, 9)]


@pytest.mark.parametrize(
    ("leads", "wins"), [((0.02, 0.01, 0.03, 0.0), True), ((0.3, -0.2, 0.3, -0.2), False)]
)
def test_a_winner_has_to_be_ahead_by_more_than_the_parts_differ(
    labels: TrialData, monkeypatch: pytest.MonkeyPatch, leads: tuple[float, ...], wins: bool
) -> None:
    """On average, both are; and the error of the examples is 0 here."""
    aucs = [auc for lead in leads[1:] for auc in (0.6 + lead, 0.6)]
    rankings = iter([Ranking(np.full(9, auc), np.full(9, auc)) for auc in aucs])
    monkeypatch.setattr(choosing, "full_training", lambda *_, **__: next(rankings))
    challenger, known = Trial(Fake(9)), (leads[0], 0.0)
    assert confirm(challenger, Trial(Fake(3)), known, fake_build, labels, math.inf) == wins
    assert challenger.lead == pytest.approx(np.mean(leads[1:])) and np.mean(leads) > 0


def test_without_time_the_best_guess_is_taken(labels: TrialData) -> None:
    tried = choose([Fake(1), Fake(9)], fake_build, labels, 0.0)
    assert [(trial.method, trial.passes) for trial in tried] == [(Fake(1), 0), (Fake(9), 0)]


@pytest.mark.parametrize(("lead", "wins"), [(0.024, False), (0.026, True)])
def test_without_time_for_other_examples_a_clear_lead_is_taken(
    labels: TrialData, lead: float, wins: bool
) -> None:
    challenger = Trial(Fake(9))
    known = lead, 0.01
    assert confirm(challenger, Trial(Fake(1)), known, fake_build, labels, 0.0) == wins
    assert challenger.lead is None


@pytest.mark.parametrize("goes_on", [1, 9])
def test_a_round_that_was_cut_off_does_not_count(
    labels: TrialData, monkeypatch: pytest.MonkeyPatch, goes_on: int
) -> None:
    """One plan alone was trained in the second round; the first round found the better one."""
    whole = Trial.train

    def train(
        trial: Trial, build: Any, data: TrialData, passes: float, end: float, order: Any = None
    ) -> None:
        if passes <= 0.5 or trial.method == Fake(goes_on):
            whole(trial, build, data, passes, end, order)

    monkeypatch.setattr(Trial, "train", train)
    monkeypatch.setattr(choosing, "confirm", lambda *details: True)
    tried = choose([Fake(1), Fake(9), Fake(8), Fake(2)], fake_build, labels, 60)
    assert tried[0].method == Fake(9)
    assert {trial.passes for trial in tried} == {1, 0.5}


def test_a_trial_ends_in_the_middle_of_a_pass(data: TrialData) -> None:
    class Endless(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

    trial = Trial(ec.Auto())
    trial.train(lambda method, data: Model(), data, 1.0, end=0.0)
    assert trial.passes == 0 and trial.auc == 0
