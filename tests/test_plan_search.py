"""compress(data=…): counts, plans tried on data, budgets by quality, and the recipe."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import embcompress as ec
from embcompress.methods.base import Method
from embcompress.methods.full import Full
from embcompress.planner.lookups import count_lookups
from embcompress.planner.ranking import Ranking
from embcompress.planner.search import PlanSearch
from embcompress.planner.trial_data import TrialData
from embcompress.training.recipe import OverfittingGuard, initialize_tables
from tests.click_batches import ITEMS, USERS, Model, TablesAlone, batches

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
    """Its trainings are a formula of the bytes; that of the full tables may be a lucky one.

    At learning rates other than the best one all tables lose another 0.05.
    """

    luck = 0.0
    best_rate = 0.03

    def _measure(self, method: Method, budget_bytes: int, learning_rate: float) -> Ranking | None:
        auc = 0.8 - 0.1 * self.expected(method, budget_bytes)
        auc -= 0.05 * (learning_rate != self.best_rate)
        noise = np.tile([0.02, -0.02], 100)  # of a difference: a standard error of 0.0028
        if method == Full():
            auc, noise = auc + self.luck, -noise
        return Ranking(auc + noise * (self.luck > 0), np.array([auc]))


def expected_loss(method: Method, budget_bytes: int) -> float:
    if budget_bytes < 50:
        return math.inf
    return max(0.0, math.log10(100_000 / budget_bytes)) if method == ec.Auto() else 0.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "data must be batches of .*; got int"),
        ([torch.zeros(3)] * 3, "pairs .*; got Tensor"),
        ([(torch.zeros(3), torch.zeros(3), 1)] * 3, "got tuple of 3"),
    ],
)
def test_data_that_are_no_batches_are_named(data: Any, message: str) -> None:
    for method in ("auto", "hash"):
        with pytest.raises(TypeError, match=message):
            ec.compress(Model(), method=method, budget="8%", data=data)


@pytest.mark.parametrize("wrong", [5.0, -1.0, math.nan])
def test_labels_that_are_no_probabilities_are_refused(wrong: float) -> None:
    labelled = [(inputs, labels.clone()) for inputs, labels in batches(4)]
    labelled[2][1][1] = wrong
    with pytest.raises(ValueError, match=f"labels must be 0 or 1, .*; got {wrong:g}"):
        ec.compress(Model(), budget="8%", data=labelled)
    ec.compress(Model(), method="hash", budget="8%", data=labelled)  # only ids are counted


@pytest.mark.parametrize("best_rate", [0.03, 0.1])
@pytest.mark.parametrize("max_auc_loss", [0.3, 0.1, 0.03, 0.004])
def test_the_fewest_bytes_that_keep_a_quality(max_auc_loss: float, best_rate: float) -> None:
    search = Measured(
        lambda method, limit: nn.Identity(), lambda method, limit: limit, expected_loss,
        dense_bytes=100_000, data=TrialData.of(batches()), seconds=60,
    )  # fmt: skip
    search.best_rate = best_rate
    found = search.smallest(ec.Auto(), max_auc_loss)
    assert found.full_auc == pytest.approx(0.8) and found.learning_rate == best_rate
    exact = max(50, 100_000 * 10 ** (-max_auc_loss / 0.1))
    assert found.budget_bytes == pytest.approx(exact, rel=0.01)
    assert list(found.measurements) == sorted(found.measurements, key=lambda each: -each.bytes)
    assert f"so {found.budget_bytes:,} bytes" in str(found)


@pytest.mark.parametrize(("luck", "is_told_apart"), [(0.005, False), (0.02, True)])
def test_full_tables_are_not_taken_by_a_lucky_auc(luck: float, is_told_apart: bool) -> None:
    def expected(method: Method, limit: int) -> float:
        is_enough = method == ec.Auto() and limit > 20_000
        return 0.0005 if is_enough else expected_loss(method, limit)

    search = Measured(
        lambda method, limit: nn.Identity(), lambda method, limit: limit, expected,
        dense_bytes=100_000, data=TrialData.of(batches()), seconds=60,
    )  # fmt: skip
    search.luck = luck
    found = search.smallest(ec.Auto(), 0.004)
    assert [each.is_like_full for each in found.measurements[:1]] == [not is_told_apart]
    if is_told_apart:
        assert found.full_auc == pytest.approx(0.82)
        assert found.budget_bytes > 90_000
    else:
        assert found.full_auc < 0.805 and found.budget_bytes <= 25_000


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
