"""What tables are worth to a model, measured by short trainings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import embcompress as ec
from embcompress.methods.base import Method
from embcompress.planner import trials, worth
from embcompress.planner.ranking import Ranking
from embcompress.planner.trial_data import TrialData
from embcompress.planner.trials import log_loss
from embcompress.planner.worth import train_full_tables
from embcompress.training.recipe import initialize_tables

ROWS = 50


class Model(nn.Module):
    """Adds one number of each table, and a constant."""

    def __init__(self, method: Method, limit: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        configs = [ec.TableConfig(name, ROWS, 1) for name in ("much", "little", "nothing")]
        self.tables = ec.EmbeddingBagCollection(configs, method=method, budget=limit)
        initialize_tables(self.tables)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        return self.bias + self.tables(
            {name: ids[:, k] for k, name in enumerate(self.tables.feature_names)}
        ).sum(1)


@pytest.fixture(scope="module")
def data() -> TrialData:
    generator = torch.Generator().manual_seed(1)
    much, little = (scale * torch.randn(ROWS, generator=generator) for scale in (3.0, 0.7))
    batches = []
    for _ in range(80):
        ids = torch.randint(0, ROWS, (200, 3), generator=generator)
        chance = torch.sigmoid(much[ids[:, 0]] + little[ids[:, 1]])
        batches.append((ids, (torch.rand(200, generator=generator) < chance).float()))
    return TrialData.of(batches)


def build_model(method: Method, limit: int, data: TrialData) -> nn.Module:
    return Model(method, limit)


def test_the_table_that_tells_most_is_worth_most(data: TrialData) -> None:
    full = train_full_tables(build_model, 3 * ROWS * 4, data, math.inf)
    assert full is not None and list(full.worths) == ["much", "little", "nothing"]
    worths = full.worths
    assert worths["much"] > 3 * worths["little"] > 9 * worths["nothing"] >= 0


def test_a_worth_is_the_log_loss_of_the_mean_vector(
    data: TrialData, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Model] = []

    def build(method: Method, limit: int, data: TrialData) -> nn.Module:
        built.append(Model(method, limit))
        return built[-1]

    monkeypatch.setattr(trials, "LEARNING_RATES", (0.03,))
    full = train_full_tables(build, 3 * ROWS * 4, data, math.inf)
    assert full is not None and len(built) == 1
    # The last pass was not better, or the fourth: its weights are still in the model.
    ids = torch.cat([inputs for inputs, _ in data.validation])
    table = built[0].tables.embedding_bags["much"]
    with torch.no_grad():
        before = log_loss(built[0], data)
        table.weight.fill_(float(table.weight[ids[:, 0]].double().mean()))
        lost = log_loss(built[0], data) - before
    assert lost == pytest.approx(full.worths["much"], rel=0.05)


@pytest.mark.parametrize(
    ("rates", "best"), [((1e-4, 0.1), 0.1), ((0.1, 1e-4), 0.1), ((0.1, 0.1), 0.1)]
)
def test_the_learning_rate_is_that_of_the_full_tables(
    data: TrialData, monkeypatch: pytest.MonkeyPatch, rates: tuple[float, ...], best: float
) -> None:
    monkeypatch.setattr(trials, "LEARNING_RATES", rates)
    full = train_full_tables(build_model, 3 * ROWS * 4, data, math.inf)
    assert full is not None and full.learning_rate == best


@pytest.mark.parametrize(("gain", "taken"), [(0.0, 0), (0.5, 1)])
def test_a_later_learning_rate_needs_a_lead(
    monkeypatch: pytest.MonkeyPatch, gain: float, taken: int
) -> None:
    random = np.random.default_rng(0)
    is_positive = random.random(500) < 0.5
    outputs = random.normal(size=500) + is_positive
    rankings = iter(
        Ranking.of(each, is_positive) for each in (outputs, outputs + gain * is_positive)
    )
    monkeypatch.setattr(worth, "full_training", lambda *_, **__: next(rankings))
    full = train_full_tables(build_model, 3 * ROWS * 4, TrialData([], []), math.inf)
    assert full is not None and full.learning_rate == trials.LEARNING_RATES[taken]


def test_large_tables_are_hashed(data: TrialData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worth, "MOST_BYTES", 3 * ROWS * 2)
    methods = set()

    def build(method: Method, limit: int, data: TrialData) -> nn.Module:
        methods.add((method, limit))
        return Model(method, limit)

    full = train_full_tables(build, 3 * ROWS * 4, data, math.inf)
    assert methods == {(ec.Hashing(), 3 * ROWS * 2)}
    assert full is not None
    assert full.worths["much"] > max(full.worths["little"], full.worths["nothing"])


def test_without_time_nothing_is_measured(data: TrialData) -> None:
    assert train_full_tables(build_model, 3 * ROWS * 4, data, 0.0) is None
