"""Plans tried on data: trials, budgets by quality, and compress(data=…)."""

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
from embcompress.planner.lookups import count_lookups
from embcompress.planner.ranking import Ranking
from embcompress.planner.search import PlanSearch
from embcompress.planner.trial_data import TrialData, full_passes, standard_error
from embcompress.planner.trials import Trial, full_training, ranking
from embcompress.training.recipe import OverfittingGuard, initialize_tables

USERS, ITEMS = 300, 1000


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user, self.item = nn.Embedding(USERS, 8), nn.EmbeddingBag(ITEMS, 8, mode="sum")
        initial = 0.05
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=initial)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        return self.scale * (self.user(user) * self.item(items)).sum(1)


class TablesAlone(Model):
    def __init__(self) -> None:
        super().__init__()
        del self.scale

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        return (self.user(user) * self.item(items)).sum(1)


def batches(count: int = 60, size: int = 100) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Clicks by latent vectors of two columns."""
    generator = torch.Generator().manual_seed(1)
    users, items = torch.randn(USERS, 2, generator=generator), torch.randn(ITEMS, 2)
    items = torch.randn(ITEMS, 2, generator=generator)
    result = []
    for _ in range(count):
        user = torch.randint(0, USERS, (size,), generator=generator)
        item = (ITEMS * torch.rand(size, generator=generator) ** 4).long()
        logit = 2 * (users[user] * items[item]).sum(1)
        label = (torch.rand(size, generator=generator) < torch.sigmoid(logit)).float()
        result.append(((user, item[:, None]), label))
    return result


@pytest.fixture(scope="module")
def data() -> TrialData:
    return TrialData.of(batches())


# ------------------------------------------------------------------------------------- trials


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


# ------------------------------------------------------------------------------------- counts


def test_lookups_are_counted_and_the_model_is_left_as_it_was() -> None:
    model = nn.ModuleDict({"user": nn.Embedding(10, 4), "dropout": nn.Dropout()})
    model["dropout"].eval()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = model
            self.collection = ec.EmbeddingBagCollection(
                [ec.TableConfig("bag", 6, 4), ec.TableConfig("other", 3, 4)]
            )

        def forward(self, user: Tensor, bag: Tensor) -> Tensor:
            assert not self.training
            vectors = self.collection({"bag": bag, "other": user % 3})
            return self.tables["user"](input=user).sum(1) + vectors.sum(1)

    wrapped = Wrapped()
    inputs = {"user": torch.tensor([1, 1, 9]), "bag": torch.tensor([[5, 5], [0, 1], [2, 5]])}
    tables = [model["user"], *wrapped.collection.embedding_bags.values()]
    counts = count_lookups(wrapped, tables, [(inputs, torch.zeros(3))] * 2)
    assert [counts[table].tolist() for table in tables] == [
        [0, 4, 0, 0, 0, 0, 0, 0, 0, 2],
        [2, 2, 2, 0, 0, 6],
        [2, 4, 0],
    ]
    assert wrapped.training and not model["dropout"].training
    assert not model["user"]._forward_pre_hooks and not wrapped.collection._forward_hooks


# ----------------------------------------------------------------------------- compress(data=)


@pytest.mark.parametrize("progress", [True, False])
def test_planning_says_what_it_does(progress: bool, capfd: pytest.CaptureFixture[str]) -> None:
    ec.compress(Model(), budget="8%", data=batches(20), progress=progress)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert ("planning, 0 of at most 100 s: reading data" in shown.err) == progress


def test_a_model_of_tables_alone_is_tried_too() -> None:
    model = TablesAlone()
    report = ec.compress(model, budget="8%", data=batches())
    assert "Tried on 5,400 examples" in report.explain()
    assert ec.memory(model).total <= 0.08 * (USERS + ITEMS) * 8 * 4


def test_compress_tries_plans_on_data() -> None:
    reports = []
    for _ in range(2):
        model = Model()
        scale, state = model.scale.clone(), torch.get_rng_state()
        report = ec.compress(model, budget="8%", data=batches())
        reports.append(report.explain())
        assert torch.equal(model.scale, scale)  # copies are trained
        assert ec.memory(model).total <= 0.08 * (USERS + ITEMS) * 8 * 4
        torch.set_rng_state(state)
    assert reports[0] == reports[1]
    assert "by known counts" in reports[0] and "Tried on 5,400 examples" in reports[0]
    assert len(report.explanations[0].tried) > 1
    assert isinstance(model.item, ec.EmbeddingBag) and model.item.mode == "sum"


def test_trials_leave_no_trace_in_the_global_random_numbers() -> None:
    weights = []
    for data in (None, batches()):
        model = Model()
        counts = count_lookups(model, [model.user, model.item], TrialData.of(batches()).training)
        torch.manual_seed(7)
        ec.compress(
            model,
            method=ec.Auto(),
            budget="99%",  # every setting gives the same plan
            data=data,
            counts={"user": counts[model.user], "item": counts[model.item]},
        )
        weights.append({key: value for key, value in model.state_dict().items()})
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either budget or max_auc_loss"),
        ({"budget": "5%", "max_auc_loss": 0.1}, "either budget or max_auc_loss"),
        ({"max_auc_loss": 0.1}, "give data=batches"),
        ({"max_auc_loss": 0.0, "data": []}, "max_auc_loss must be positive, got 0.0"),
        ({"budget": "5%", "plan_seconds": 0}, "plan_seconds must be positive, got 0"),
        ({"budget": "5%", "data": [], "keep_weights": True}, "leave one of them out"),
        ({"budget": "5%", "data": [], "method": "hash"}, "data yields no batches"),
        ({"budget": "5%", "data": []}, "data yields no batches"),
        ({"budget": "5%", "data": [], "method": {"user": "auto", "item": ec.Auto(chunks=2)}},
         "got 2 different ones"),
        ({"max_auc_loss": 0.1, "data": [], "method": "hash"}, "for all tables"),
        ({"max_auc_loss": 0.1, "data": [], "method": {"user": "auto", "item": "hash"}},
         "for all tables"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_together(arguments: dict[str, Any], message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        ec.compress(model, **arguments)
    assert type(model.user) is nn.Embedding


@pytest.mark.parametrize("method", ["hash", "pruned", "double_hash"])
def test_other_methods_may_stand_beside_the_planner(method: str) -> None:
    model = Model()
    report = ec.compress(
        model, method={"user": method, "item": "auto"}, budget="10%", data=batches(20)
    )
    assert [table.method for table in report.tables] == [method, "auto"]
    assert len(report.explanations) == 1 and report.explanations[0].tables[0].name == "item"


# ------------------------------------------------------------------------------------ quality


def test_a_quality_is_a_budget() -> None:
    sizes = []
    for max_auc_loss in (0.15, 0.02):
        model = Model()
        report = ec.compress(model, max_auc_loss=max_auc_loss, data=batches(), plan_seconds=90)
        sizes.append(ec.memory(model).total)
        assert sizes[-1] <= report.budget < report.before
        text = report.explain()
        assert f"At most {max_auc_loss:g} of the full tables' AUC" in text and "lose" in text
    assert sizes[0] < sizes[1]


class Measured(PlanSearch):
    """Its trainings are a formula of the bytes."""

    def _measure(self, method: Method, budget_bytes: int) -> float | None:
        return 0.8 - 0.1 * expected_loss(method, budget_bytes)


def expected_loss(method: Method, budget_bytes: int) -> float:
    if budget_bytes < 50:
        return math.inf
    return max(0.0, math.log10(100_000 / budget_bytes)) if method == ec.Auto() else 0.0


@pytest.mark.parametrize("max_auc_loss", [0.3, 0.1, 0.03, 0.004])
def test_the_fewest_bytes_that_keep_a_quality(labels: TrialData, max_auc_loss: float) -> None:
    search = Measured(
        lambda method, limit: nn.Identity(), lambda method, limit: limit, expected_loss,
        dense_bytes=100_000, data=labels, seconds=60,
    )  # fmt: skip
    found = search.smallest(ec.Auto(), max_auc_loss)
    exact = max(50, 100_000 * 10 ** (-max_auc_loss / 0.1))
    assert found.budget_bytes == pytest.approx(exact, rel=0.01)
    assert list(found.measurements) == sorted(found.measurements, key=lambda each: -each.bytes)
    assert f"so {found.budget_bytes:,} bytes" in str(found)


def test_too_little_time_for_a_quality_is_an_error() -> None:
    with pytest.raises(ValueError, match="plan_seconds=1e-09 is too short"):
        ec.compress(Model(), max_auc_loss=0.1, data=batches(4), plan_seconds=1e-9)


# ------------------------------------------------------------------------------------- recipe


def test_the_guard_keeps_the_best_epoch() -> None:
    model, guard = nn.Linear(1, 1, bias=False), OverfittingGuard(patience=2)
    stops = []
    for epoch, score in enumerate([0.5, 0.7, 0.7, 0.6], 1):
        nn.init.constant_(model.weight, epoch)
        stops.append(guard.end_epoch(model, score))
    assert stops == [False, False, False, True]
    assert guard.best_epoch == 2 and set(guard.states) == {1, 2}
    guard.restore(model)
    assert model.weight.item() == 2
    guard.restore(model, 1)
    assert model.weight.item() == 1


def test_all_methods_start_with_one_deviation() -> None:
    for name in ("full", "hash", "multihash", "qr", "low_dim", "low_bit", "auto"):
        torch.manual_seed(0)
        table = ec.Embedding(3000, 16, method=name, budget=None if name == "full" else "10%")
        initialize_tables(nn.Sequential(table), 0.05)
        assert float(table.to_dense().std()) == pytest.approx(0.05, rel=0.4), name


def test_a_trial_ends_in_the_middle_of_a_pass(data: TrialData) -> None:
    class Endless(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

    trial = Trial(ec.Auto())
    trial.train(lambda method, data: Model(), data, 1.0, end=0.0)
    assert trial.passes == 0 and trial.auc == 0
