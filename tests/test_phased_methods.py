"""What every method with phases keeps to, generated over the registry."""

from __future__ import annotations

import copy

import pytest
import torch

import embcompress as ec
from embcompress.methods import resolve_method
from tests.phased_method import Model, assert_same, run, score

METHODS = [name for name in sorted(ec.methods()) if len(resolve_method(name).phases()) > 1]
STEPS = 5


def test_there_are_some() -> None:
    assert "dedup" in METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["60%", "35%"])
def test_the_bytes_of_the_end_are_within_those_of_the_beginning(method: str, budget: str) -> None:
    model = Model(method, budget=budget)
    built, dense = ec.memory(model).total, ec.memory(model).dense
    assert built <= dense * int(budget[:-1]) / 100
    procedure = ec.TrainingProcedure(model)
    while procedure.begin_phase(lambda: score(model)) is not None:
        assert ec.memory(model).total <= built
    procedure.close()
    assert ec.memory(model).total == sum(model.table(k).plan.bytes for k in range(2))
    assert ec.memory(ec.deploy(copy.deepcopy(model))).training == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [True, False])
def test_training_goes_on_in_the_middle_of_every_phase(method: str, fused: bool) -> None:
    straight = run(Model(method), fused, STEPS)
    for number in range(len(resolve_method(method).phases())):
        resumed = run(Model(method), fused, STEPS, (number, 3))
        for one, other in zip(straight, resumed, strict=True):
            assert_same(dict(one.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("method", METHODS)
def test_all_phases_together_learn(method: str) -> None:
    model, *_ = run(Model(method), steps=40)
    assert score(model) > score(Model(method)) + 0.01
    ids = torch.arange(40)
    deployed = ec.deploy(copy.deepcopy(model))
    expected = model.table(1).vectors(ids)
    torch.testing.assert_close(deployed.table(1).vectors(ids), expected)
