"""ALPT: rows in few bits, their learned steps, and the order of a step of training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.approximation.calibration import Share
from embcompress.procedures.stochastic_rounding import uniform_numbers

ROWS, WIDTH = 150, 8
SHARES: tuple[Share, ...] = ("row", "column", "table")


def table(budget: str | None = None, **settings: object) -> ec.Embedding:
    torch.manual_seed(0)
    return ec.Embedding(ROWS, WIDTH, method=ec.Alpt(**settings), budget=budget)


@pytest.mark.parametrize("scale", SHARES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_lookup_is_its_formula(bits: int, scale: Share) -> None:
    module, ids = table(bits=bits, scale=scale), torch.arange(ROWS)
    with torch.no_grad():
        module.scale.mul_(torch.rand_like(module.scale) + 0.5)
    middle = (2**bits - 1) / 2
    code = (module.weight / module.scale + middle).round().clamp(0, 2**bits - 1)
    torch.testing.assert_close(module(ids), module.scale * (code - middle))
    shape = {"row": (ROWS, 1), "column": (1, WIDTH), "table": (1, 1)}[scale]
    assert module.scale.shape == shape
    assert module.plan.bytes == ROWS * WIDTH * bits // 8 + 4 * shape[0] * shape[1]


def test_small_budgets_make_rows_narrower() -> None:
    module = table("20%")
    (rows, width), projection = module.weight.shape, module.projection
    assert rows == ROWS and width < WIDTH and projection.shape == (WIDTH, width)
    code = (module.weight / module.scale + 127.5).round().clamp(0, 255)
    expected = (module.scale * (code - 127.5)) @ projection.T
    torch.testing.assert_close(module(torch.arange(ROWS)), expected)


@pytest.mark.parametrize("scale", SHARES)
@pytest.mark.parametrize("budget", [None, "45%"])
def test_a_step_is_the_papers(scale: Share, budget: str | None) -> None:
    """Rows by the optimizer, steps by equation 7 at the moved rows, then stochastic rounding."""
    rate, lr, bits = 0.05, 0.2, 4
    module = table(budget, bits=bits, scale=scale, scale_rate=rate, rounding_seed=3)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    procedure = ec.TrainingProcedure(module, optimizer)
    step, start = module.scale.detach().clone(), module.weight.detach().clone()
    ids = torch.tensor([4, 9, 4, 77])
    gradient = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    head = None if module.plan.head is None else module.projection.detach().clone()
    module(ids).backward(gradient)
    optimizer.step()
    moved = module.weight.detach().clone()
    procedure.step()

    rows, middle = torch.tensor([4, 9, 77]), (2**bits - 1) / 2
    of_values = torch.zeros(ROWS, WIDTH).index_add_(0, ids, gradient)[rows]
    if head is not None:
        of_values = of_values @ head
    width = of_values.shape[1]
    own = step[rows] if scale == "row" else step
    x = moved[rows] / own + middle
    code = x.round().clamp(0, 2**bits - 1)
    of_step = torch.where((x - code).abs() <= 0.5, code - x, code - middle)
    of_step = of_values * of_step / (len(ids) * width * (2 ** (bits - 1) - 1)) ** 0.5
    # The first step of Adam has the length of its rate.
    expected = own * torch.exp(-rate * of_step.sum_to_size(own.shape).sign())
    learned = module.scale[rows] if scale == "row" else module.scale
    torch.testing.assert_close(learned, expected)

    x = (moved[rows] / expected + middle).clamp(0, 2**bits - 1)
    code = x.floor() + (uniform_numbers(3, 1, rows, width) < x - x.floor())
    torch.testing.assert_close(module.weight[rows], expected * (code - middle))
    others = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(module.weight[others], start[others])
    if scale == "row":
        assert torch.equal(module.scale[others], step[others])


def test_the_second_step_of_adam() -> None:
    """Moments of the steps' logarithms, as torch's Adam has them."""
    module = table(scale="table", scale_rate=0.01, bits=4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    procedure = ec.TrainingProcedure(module, optimizer)
    logarithm = module.scale.detach().log().requires_grad_()
    judge = torch.optim.Adam([logarithm], lr=0.01, eps=1e-12)
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, ROWS, (20,), generator=generator)
        gradient = torch.randn(20, WIDTH, generator=generator)
        optimizer.zero_grad()
        module(ids).backward(gradient)
        optimizer.step()
        step = logarithm.detach().exp()
        x = module.weight.detach() / step + 7.5
        code = x.round().clamp(0, 15)
        of_step = torch.where((x - code).abs() <= 0.5, code - x, code - 7.5)
        of_values = torch.zeros(ROWS, WIDTH).index_add_(0, ids, gradient)
        logarithm.grad = (step * (of_values * of_step).sum() / (20 * WIDTH * 7) ** 0.5).detach()
        judge.step()
        procedure.step()
        torch.testing.assert_close(module.scale.detach(), logarithm.detach().exp())


def train(
    module: ec.Embedding, optimizer: torch.optim.Optimizer, procedure: ec.TrainingProcedure,
    steps: range,
) -> None:  # fmt: skip
    wanted = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5))
    for step in steps:
        ids = torch.randint(0, ROWS, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (module(ids) - wanted[ids]).square().mean().backward()
        optimizer.step()
        procedure.step()


def new_training(
    lr: float = 0.1, **settings: object
) -> tuple[ec.Embedding, torch.optim.Optimizer, object]:
    module = table(**settings)
    optimizer = torch.optim.Adagrad(module.parameters(), lr=lr)
    return module, optimizer, ec.TrainingProcedure(module, optimizer)


def test_training_learns_and_leaves_nothing_but_codes() -> None:
    module, optimizer, procedure = new_training(lr=0.5, scale_rate=0.01)
    wanted = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5))
    train(module, optimizer, procedure, range(400))
    vectors = module.to_dense()
    assert float((vectors - wanted).square().mean()) < 0.02
    assert ec.memory(module).training >= ROWS * (WIDTH + 3) * 4
    procedure.close()
    torch.testing.assert_close(module.weight, vectors)  # latents are their codes' values
    assert torch.equal(ec.deploy(module).to_dense(), vectors)
    assert ec.memory(module).training == 0


def test_training_goes_on_from_a_saved_state() -> None:
    module, optimizer, procedure = new_training(scale_rate=0.01)
    train(module, optimizer, procedure, range(7))
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict(), procedure.state_dict()))
    train(module, optimizer, procedure, range(7, 15))
    other = new_training(scale_rate=0.01)
    for part, state in zip(other, saved, strict=True):
        part.load_state_dict(state)
    train(*other, range(7, 15))
    assert torch.equal(other[0].to_dense(), module.to_dense())
    assert torch.equal(other[0].scale, module.scale)


def test_without_a_procedure_steps_stand_still() -> None:
    module = table(bits=4)
    assert not module.scale.requires_grad and module.weight.requires_grad
    before = module.scale.detach().clone()
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1)
    module(torch.arange(ROWS)).square().sum().backward()
    optimizer.step()
    assert torch.equal(module.scale, before)


def test_fitted_tables_are_near() -> None:
    weight = torch.randn(ROWS, WIDTH) * torch.logspace(-3, 3, ROWS)[:, None]
    module = ec.Embedding.from_pretrained(weight, method="alpt")
    error = (module.to_dense() - weight).norm(dim=1) / weight.norm(dim=1)
    assert float(error.max()) < 0.01  # every row has a step of its own


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 16}, "bits must be one of"),
        ({"scale": "id"}, "scale must be"),
        ({"scale_rate": 1.0}, "scale_rate must be in"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ec.Alpt(**settings)


def tensors(procedure: ec.TrainingProcedure) -> dict[str, Tensor]:
    return procedure.tables[""].tensors()


def test_nothing_is_kept_of_a_batch_once_its_step_is_done() -> None:
    module, optimizer, procedure = new_training()
    train(module, optimizer, procedure, range(2))
    for name in ("gradients", "touched", "occurrences"):
        assert not tensors(procedure)[name].any()
