"""Stochastic rounding while rows of a few bits train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.hashing import derive_key, hash_bucket
from embcompress.procedures.stochastic_rounding import round_stochastically, uniform_numbers

ROWS, WIDTH = 200, 6


def table(seed: int = 0) -> ec.Embedding:
    torch.manual_seed(0)
    return ec.Embedding(ROWS, WIDTH, method=ec.Int8(rounding="stochastic", rounding_seed=seed))


def train(
    module: ec.Embedding, optimizer: torch.optim.Optimizer, procedure: ec.TrainingProcedure,
    steps: range,
) -> None:  # fmt: skip
    for step in steps:
        ids = torch.randint(0, ROWS, (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (module(ids) - 1).square().sum().backward()
        optimizer.step()
        procedure.step()


def positions(module: ec.Embedding) -> Tensor:
    return ((module.weight - module.bias) / module.scale).detach()


def test_uniform_numbers_are_the_specified_hash() -> None:
    rows = torch.tensor([5, 2**40])
    numbers = uniform_numbers(7, 3, rows, 2)
    key = derive_key(7, "rounding", 3)
    for i, row in enumerate(rows.tolist()):
        for column in range(2):
            assert float(numbers[i, column]) == hash_bucket(row * 2 + column, key, 2**24) / 2**24
    many = uniform_numbers(0, 1, torch.arange(5000), 4)
    assert many.min() >= 0 and many.max() < 1
    assert abs(float(many.mean()) - 0.5) < 0.01


def test_rounding_is_right_on_average_and_leaves_codes_alone() -> None:
    uniform = torch.linspace(0, 1, 1001)[:-1]
    for position in (3.25, 3.5, 3.9):
        codes = round_stochastically(torch.full((1000,), position), uniform)
        assert set(codes.tolist()) == {3.0, 4.0}
        assert float(codes.mean()) == pytest.approx(position, abs=2e-3)
    whole = torch.arange(2.0**16)
    assert torch.equal(round_stochastically(whole, torch.zeros(2**16)), whole)


def test_a_step_rounds_the_rows_that_it_read_and_no_others() -> None:
    module = table()
    # Steps that do not move: what rounding does is seen alone.
    optimizer = torch.optim.SGD([module.weight], lr=0.1)
    procedure = ec.TrainingProcedure(module, optimizer)
    before = positions(module)
    ids = torch.tensor([3, 3, 8])
    module(ids).sum().backward()
    optimizer.step()
    moved = positions(module)
    procedure.step()
    after = positions(module)
    others = torch.ones(ROWS, dtype=torch.bool)
    others[ids] = False
    assert torch.equal(after[others], before[others])
    rows = torch.tensor([3, 8])
    x = moved[rows].clamp(0, 255)
    expected = x.floor() + (uniform_numbers(0, 1, rows, WIDTH) < x - x.floor())
    torch.testing.assert_close(after[rows], expected, rtol=0, atol=1e-3)
    assert not procedure.tables[""].tensor("touched").any()


def test_updates_far_smaller_than_a_step_add_up() -> None:
    """Rounded to the nearest code after every step, the rows would stand still."""
    module = table()
    with torch.no_grad():
        module.weight.copy_(module.bias + module.scale * positions(module).clamp(9, 245).round())
    start = positions(module)
    optimizer = torch.optim.SGD([module.weight], lr=module.scale[0, 0].item() / 20)
    procedure = ec.TrainingProcedure(module, optimizer)
    for _ in range(100):  # a twentieth of a step each
        optimizer.zero_grad()
        (-module(torch.arange(ROWS)).sum()).backward()
        optimizer.step()
        procedure.step()
    moved = positions(module) - start
    assert float(moved.mean()) == pytest.approx(5, abs=0.3)
    torch.testing.assert_close(positions(module), positions(module).round(), rtol=0, atol=1e-3)


def test_deployed_rows_are_the_trained_ones_and_seeds_tell_runs_apart() -> None:
    results = []
    for seed in (0, 0, 1):
        module = table(seed)
        optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1)
        procedure = ec.TrainingProcedure(module, optimizer)
        train(module, optimizer, procedure, range(20))
        expected = module.to_dense()
        results.append(module.weight.detach().clone())
        assert torch.equal(ec.deploy(module).to_dense(), expected)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_training_goes_on_from_a_saved_state() -> None:
    module = table()
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1)
    procedure = ec.TrainingProcedure(module, optimizer)
    train(module, optimizer, procedure, range(7))
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict(), procedure.state_dict()))
    train(module, optimizer, procedure, range(7, 15))

    other = table()
    its_optimizer = torch.optim.Adagrad(other.parameters(), lr=0.1)
    its_procedure = ec.TrainingProcedure(other, its_optimizer)
    for part, state in zip((other, its_optimizer, its_procedure), saved, strict=True):
        part.load_state_dict(state)
    train(other, its_optimizer, its_procedure, range(7, 15))
    assert torch.equal(other.to_dense(), module.to_dense())


def test_unknown_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', got 'up'"):
        ec.Int4(rounding="up")  # type: ignore[arg-type]
