"""What tables are worth to a model, measured by short trainings."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import embcompress as ec
from embcompress.methods.base import Method
from embcompress.planner import worth
from embcompress.planner.trials import TrialData, log_loss
from embcompress.planner.worth import measure_worths
from embcompress.training.recipe import initialize_tables

ROWS = 50
Build = Callable[[Method, int], nn.Module]


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


def test_the_table_that_tells_most_is_worth_most(data: TrialData) -> None:
    worths = measure_worths(Model, 3 * ROWS * 4, data, math.inf)
    assert worths is not None and list(worths) == ["much", "little", "nothing"]
    assert worths["much"] > 3 * worths["little"] > 9 * worths["nothing"] >= 0


def test_a_worth_is_the_log_loss_of_the_mean_vector(data: TrialData) -> None:
    built: list[nn.Module] = []

    def build(method: Method, limit: int) -> nn.Module:
        built.append(Model(method, limit))
        return built[-1]

    one_pass = TrialData(data.training, data.validation)
    worths = measure_worths(build, 3 * ROWS * 4, one_pass, math.inf)
    assert worths is not None and len(built) == 1
    # The last pass was not better, or the fourth: its weights are still in the model.
    ids = torch.cat([inputs for inputs, _ in data.validation])
    table = built[0].tables.embedding_bags["much"]
    with torch.no_grad():
        before = log_loss(built[0], data)
        table.weight.fill_(float(table.weight[ids[:, 0]].double().mean()))
        lost = log_loss(built[0], data) - before
    assert lost == pytest.approx(worths["much"], rel=0.05)


def test_large_tables_are_hashed(data: TrialData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worth, "MOST_BYTES", 3 * ROWS * 2)
    methods = []

    def build(method: Method, limit: int) -> nn.Module:
        methods.append((method, limit))
        return Model(method, limit)

    worths = measure_worths(build, 3 * ROWS * 4, data, math.inf)
    assert methods == [(ec.Hashing(), 3 * ROWS * 2)]
    assert worths is not None and worths["much"] > max(worths["little"], worths["nothing"])


def test_without_time_nothing_is_measured(data: TrialData) -> None:
    assert measure_worths(Model, 3 * ROWS * 4, data, 0.0) is None
