"""Learned steps move as far, for their size, as the rows that are read by them."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec

ROWS, WIDTH = 40, 6
IDS = torch.arange(ROWS)


def table(method: ec.Method, budget: str | None = None) -> ec.Embedding:
    torch.manual_seed(0)
    module = ec.Embedding(ROWS, WIDTH, method=method, budget=budget)
    module.reset_parameters(0.05)
    return module


def loss(module: ec.Embedding, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return (module(IDS) - torch.randn(ROWS, WIDTH, generator=generator)).square().sum()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_the_outermost_code_moves_as_the_optimizer_would_move_the_step(
    optimizer: str, bits: int, rounding: str
) -> None:
    method = {4: ec.Int4, 8: ec.Int8}[bits](rounding=rounding)
    damped, plain = table(method), table(method)
    for module in (damped, plain):
        ec.fuse_optimizer(module, optimizer, lr=1e-3)
    procedure = ec.TrainingProcedure(damped)
    first, middle = damped.scale.detach().clone(), (2**bits - 1) / 2
    for module in (damped, plain):
        loss(module, 0).backward()
    procedure.step()
    moved = plain.scale.detach() - first
    assert moved.abs().min() > 0.9e-3
    torch.testing.assert_close((damped.scale - first) * middle, moved, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(damped.bias, plain.bias)


def test_steps_keep_their_sign_whatever_the_rate() -> None:
    module = table(ec.Int8(), "30%")
    ec.fuse_optimizer(module, "adagrad", lr=10.0)
    procedure = ec.TrainingProcedure(module)
    for step in range(5):
        before = module.scale.detach().clone()
        loss(module, step).backward()
        procedure.step()
        assert (module.scale >= before / 2).all() and (module.scale <= before * 1.5).all()


def test_sgd_moves_steps_by_the_papers_gradients() -> None:
    """Without state there is nothing that a gradient is divided by."""
    for fused in (True, False):
        damped, plain = table(ec.Int8()), table(ec.Int8())
        procedure = ec.TrainingProcedure(damped)
        for module in (damped, plain):
            if fused:
                ec.fuse_optimizer(module, "sgd", lr=0.01)
            loss(module, 0).backward()
            if not fused:
                torch.optim.SGD(module.parameters(), lr=0.01).step()
        procedure.step()
        torch.testing.assert_close(damped.scale, plain.scale, rtol=0, atol=0)


def test_an_optimizer_of_torch_is_damped_too() -> None:
    fused, plain = table(ec.Int4()), table(ec.Int4())
    ec.fuse_optimizer(fused, "adagrad", lr=1e-3)
    optimizer = torch.optim.Adagrad(plain.parameters(), lr=1e-3)
    procedures = ec.TrainingProcedure(fused), ec.TrainingProcedure(plain, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        for module in (fused, plain):
            loss(module, step).backward()
        optimizer.step()
        for procedure in procedures:
            procedure.step()
    torch.testing.assert_close(plain.scale, fused.scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [ec.Int8(scale="row"), ec.Int16()])
def test_steps_of_single_rows_and_those_that_stand_still_need_no_damping(
    method: ec.Method,
) -> None:
    assert not ec.TrainingProcedure(table(method)).tables


def test_rows_stay_inside_of_the_codes() -> None:
    """Of undamped steps of 8 bits most rows end up outside, where no gradient reaches them."""
    shares = []
    for damped in (True, False):
        module = table(ec.Int8())
        ec.fuse_optimizer(module, "adagrad", lr=0.03)
        procedure = ec.TrainingProcedure(module)
        for _ in range(3):
            loss(module, 0).backward()
            if damped:
                procedure.step()
        positions = (module.weight - module.bias) / module.scale
        inside = (positions >= -0.5) & (positions <= 255.5)
        shares.append(float(inside.float().mean()))
    assert shares[0] > 0.9 > 0.6 > shares[1]


def test_training_goes_on_from_a_saved_state() -> None:
    def trained(stop: int) -> ec.Embedding:
        module = table(ec.Int8())
        ec.fuse_optimizer(module, "adagrad", lr=0.1)
        procedure = ec.TrainingProcedure(module)
        for step in range(6):
            if step == stop:
                states = module.state_dict(), procedure.state_dict()
                module = table(ec.Int8())
                ec.fuse_optimizer(module, "adagrad", lr=0.1)
                procedure = ec.TrainingProcedure(module)
                module.load_state_dict(states[0])
                procedure.load_state_dict(states[1])
            loss(module, step).backward()
            procedure.step()
        return module

    one, other = trained(-1), trained(3)
    assert torch.equal(one.scale, other.scale) and torch.equal(one.weight, other.weight)
