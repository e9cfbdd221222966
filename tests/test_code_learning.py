"""Codes of product quantization that are learned while the table trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.layouts.product import ProductLayout

ROWS, WIDTH = 200, 8


def target() -> Tensor:
    """Ten clusters of ids."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, WIDTH, generator=generator)
    return centers[torch.randint(0, 10, (ROWS,), generator=generator)]


def table(**settings: object) -> ec.Embedding:
    torch.manual_seed(0)
    settings = {"parts": 2, "bits": 4, "interval": 5, **settings}
    return ec.Embedding(ROWS, WIDTH, method=ec.ProductQuantization(**settings), budget="90%")


def codes_of(module: ec.Embedding) -> Tensor:
    return ProductLayout.of(module.plan).read_codes(module.stores(), 0, ROWS)


def train(
    module: ec.Embedding,
    optimizer: torch.optim.Optimizer | None,
    procedure: ec.TrainingProcedure,
    steps: range,
) -> None:
    wanted = target()
    for step in steps:
        ids = torch.randint(0, ROWS, (64,), generator=torch.Generator().manual_seed(step))
        (module(ids) - wanted[ids]).square().sum().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        procedure.step()


def error(module: ec.Embedding) -> float:
    return float((module.to_dense() - target()).square().mean().detach())


@pytest.mark.parametrize("norm_bits", [None, 4])
def test_learned_codes_find_the_clusters_and_hashed_ones_cannot(norm_bits: int | None) -> None:
    errors = {}
    for codes in ("learned", "fixed"):
        module = table(codes=codes, norm_bits=norm_bits)
        ec.fuse_optimizer(module, "adagrad", lr=0.1)
        procedure = ec.TrainingProcedure(module)
        assert len(procedure.tables) == (codes == "learned")
        train(module, None, procedure, range(300))
        errors[codes] = error(module)
    assert errors["learned"] < 0.3 * errors["fixed"]


def test_an_id_takes_the_codewords_nearest_to_where_its_gradient_leads() -> None:
    """Codewords that stand still: the vector, less the Adagrad step of its own."""
    module = table(interval=1, code_rate=2.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    procedure = ec.TrainingProcedure(module, optimizer)
    before, codes = module.to_dense().detach(), codes_of(module)
    optimizer.param_groups[0]["lr"] = 0.25
    module(torch.tensor([7, 7, 9])).backward(torch.tensor([[1.0], [1.0], [-3.0]]).expand(3, WIDTH))
    procedure.step()  # the optimizer makes no step
    # A first step of Adagrad has the length of its rate, 2 · 0.25, in every column.
    wanted = before.clone()
    wanted[7] -= 0.5
    wanted[9] += 0.5
    for t in range(2):
        part, book = wanted[:, 4 * t : 4 * t + 4], module.get_parameter(f"codebook_{t}")
        codes[[7, 9], t] = torch.cdist(part, book)[[7, 9]].argmin(1)
    assert torch.equal(codes_of(module), codes)
    rest = procedure.tables[""].tensor("steps")
    torch.testing.assert_close(rest[[7, 9]], (wanted - module.to_dense())[[7, 9]].detach())
    assert not rest[torch.arange(ROWS) % 2 == 0].any()


def test_training_goes_on_from_a_saved_state() -> None:
    straight = table()
    ec.fuse_optimizer(straight, "adagrad", lr=0.1)
    procedure = ec.TrainingProcedure(straight)
    train(straight, None, procedure, range(13))
    resumed = table()
    ec.fuse_optimizer(resumed, "adagrad", lr=0.1)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    again = ec.TrainingProcedure(resumed)
    again.load_state_dict(copy.deepcopy(procedure.state_dict()))
    train(straight, None, procedure, range(13, 30))
    train(resumed, None, again, range(13, 30))
    assert torch.equal(straight.codes, resumed.codes)
    assert torch.equal(straight.to_dense(), resumed.to_dense())


def test_means_and_sample_weights_share_the_gradient() -> None:
    """Bags of two ids: each has half of a mean's gradient, or its weight's share of a sum's."""
    found = []
    for mode in ("mean", "sum"):
        torch.manual_seed(0)
        method = ec.ProductQuantization(parts=2, bits=4, interval=100)
        bags = ec.EmbeddingBag(ROWS, WIDTH, mode=mode, method=method, budget="90%")
        procedure = ec.TrainingProcedure(bags, torch.optim.SGD(bags.parameters(), lr=1.0))
        weights = torch.full((1, 2), 0.5) if mode == "sum" else None
        bags(torch.tensor([[3, 4]]), per_sample_weights=weights).sum().backward()
        squares = procedure.tables[""].tensor("squares")
        torch.testing.assert_close(squares[3:5], torch.full((2,), 0.25))
        found.append(procedure.tables[""].tensor("steps").clone())
    assert torch.equal(*found)


def test_what_cannot_be_learned_is_refused() -> None:
    module = table()
    procedure = ec.TrainingProcedure(module)  # no optimizer
    with pytest.raises(ValueError, match=r"pass it: TrainingProcedure\(model, optimizer\)"):
        module(torch.tensor([1])).sum().backward()
    procedure.close()
    method = ec.ProductQuantization(parts=2, bits=4)
    bags = ec.EmbeddingBag(ROWS, WIDTH, mode="max", method=method, budget="90%")
    procedure = ec.TrainingProcedure(bags, torch.optim.SGD(bags.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="maxima"):
        bags(torch.tensor([[1, 2]])).sum().backward()
    for settings, match in (
        ({"codes": "guessed"}, "codes must be"),
        ({"interval": 0}, "interval must be"),
        ({"code_rate": 0.0}, "code_rate must be"),
        ({"norm_bits": 17}, "norm_bits must be in"),
    ):
        with pytest.raises(ValueError, match=match):
            ec.ProductQuantization(**settings)
