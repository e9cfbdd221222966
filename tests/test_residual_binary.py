"""Residual 1-bit codes: the sum, recurrent binarization, phases, fewer codes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.methods import TableSpec
from tests.phased_method import Model, assert_same, run

ROWS, WIDTH = 300, 8
IDS = torch.arange(ROWS)


def table(budget: str, **settings: object) -> ec.Embedding:
    torch.manual_seed(0)
    return ec.Embedding(ROWS, WIDTH, method=ec.ResidualBinary(**settings), budget=budget)


@pytest.mark.parametrize("codes", [1, 2, 5, 8])
def test_the_lookup_is_its_formula(codes: int) -> None:
    module = table("100%", codes=codes)
    stores = module.stores()
    assert len(module.plan.probes) == codes
    expected = sum(
        stores[f"scale_{t}"] * torch.where(stores[f"codes_{t}"] > 0, 0.5, -0.5)
        for t in range(codes)
    )
    torch.testing.assert_close(module(IDS), expected)
    assert module.plan.bytes == codes * (ROWS * WIDTH // 8 + 4 * WIDTH)


def test_small_budgets_make_rows_narrower() -> None:
    module = table("2.5%", codes=1)
    width = module.codes_0.shape[1]
    assert len(module.plan.probes) == 1
    assert width < WIDTH and module.projection.shape == (WIDTH, width)
    signs = torch.where(module.codes_0 > 0, 0.5, -0.5)
    torch.testing.assert_close(module(IDS), (module.scale_0 * signs) @ module.projection.T)


def recurrent_binarization(weight: Tensor, codes: int) -> Tensor:
    """Section 3.1 in its shortest form, with the least squares' step for each column."""
    approximation = torch.zeros_like(weight)
    for _ in range(codes):
        residual = weight - approximation
        approximation = approximation + residual.sign() * residual.abs().mean(0)
    return approximation


@pytest.mark.parametrize("codes", [1, 2, 5])
def test_fit_is_recurrent_binarization(codes: int) -> None:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    method = ec.ResidualBinary(codes=codes)
    module = ec.Embedding.from_pretrained(weight, method=method, budget="100%")
    torch.testing.assert_close(module.to_dense(), recurrent_binarization(weight, codes))


def test_every_code_makes_the_error_smaller_and_tables_can_be_cut() -> None:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    whole = ec.Embedding.from_pretrained(weight, method="residual_binary", budget="100%")
    errors = []
    for codes in range(1, 9):
        for module in (whole, ec.deploy(ec.Embedding.from_pretrained(
            weight, method="residual_binary", budget="100%"
        ))):  # fmt: skip
            small = ec.ResidualBinary.cut(module, codes)
            expected = recurrent_binarization(weight, codes)
            torch.testing.assert_close(small.to_dense(), expected)
            assert ec.memory(small).total == small.plan.bytes
        errors.append(float((small.to_dense() - weight).square().mean()))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.05 * errors[0]
    with pytest.raises(ValueError, match=r"codes must be in \[1, 8\], got 9"):
        ec.ResidualBinary.cut(whole, 9)
    with pytest.raises(ValueError, match="vectors are sums"):
        ec.ResidualBinary.cut(ec.Embedding(ROWS, WIDTH, method="qr"), 1)


def test_frequent_ids_are_nearer() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    weight[:20] *= 3
    counts = torch.where(IDS < 20, 1000, 1)
    errors = []
    for known in (None, counts):
        method = ec.ResidualBinary(codes=1)
        module = ec.Embedding.from_pretrained(weight, method=method, budget="5%", counts=known)
        errors.append(float((module.to_dense() - weight)[:20].square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_gradients_go_straight_through() -> None:
    """Within one and a half codes of the middle; the step gets the sign's share."""
    module = table("100%", codes=2)
    gradient = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))
    module(IDS).backward(gradient)
    for t in range(2):
        latents, scale = module.stores()[f"codes_{t}"], module.stores()[f"scale_{t}"]
        inside = latents.abs() <= scale
        torch.testing.assert_close(latents.grad, gradient * inside)
        code = torch.where(latents > 0, 0.5, -0.5)
        of_step = torch.where(inside, code - latents / scale, code)
        expected = (gradient * of_step).sum(0, keepdim=True) / ROWS**0.5
        torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-5)


def test_the_float_table_is_binarized_between_the_phases() -> None:
    model = Model(ec.ResidualBinary(), budget="40%")
    procedure = ec.TrainingProcedure(model)
    assert procedure.begin_phase(None).name == "floats"
    dense = [model.table(k).weight.detach().clone() for k in range(2)]
    assert procedure.begin_phase(None).name == "codes"
    for k, weight in enumerate(dense):
        module = model.table(k)
        codes = len(module.plan.probes)
        found = module.vectors(torch.arange(len(weight)))
        torch.testing.assert_close(found, recurrent_binarization(weight, codes))
        assert torch.equal(module.codes_0, weight)  # the latents are residuals
    assert procedure.begin_phase(None) is None
    assert ec.memory(model.embeddings).total <= 0.4 * 100 * 8 * 4


@pytest.mark.parametrize("resume_at", [(0, 3), (1, 2)])
def test_training_goes_on_after_an_interruption(resume_at: tuple[int, int]) -> None:
    whole = run(Model(ec.ResidualBinary()))
    halves = run(Model(ec.ResidualBinary()), resume_at=resume_at)
    for one, other in zip(whole, halves, strict=True):
        assert_same(one.state_dict(), other.state_dict())


def test_the_dial_and_the_settings() -> None:
    method, spec = ec.ResidualBinary(), TableSpec(ROWS, WIDTH)
    sizes = [method.plan(spec, size).bytes for size in method.sizes(spec)]
    assert sizes == sorted(set(sizes))
    with pytest.raises(ValueError, match=r"codes must be in \[1, 8\], got 9"):
        ec.ResidualBinary(codes=9)
    with pytest.raises(ValueError, match="float_epochs must be at least 1"):
        ec.ResidualBinary(float_epochs=0)
