"""MEmCom: a hashed row times a number of the id's own."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.hashing import derive_key, hash_bucket
from embcompress.methods import TableSpec

ROWS, WIDTH = 500, 12
IDS = torch.arange(ROWS)


def test_memcom() -> None:
    module = ec.Embedding(ROWS, WIDTH, method="memcom", budget="20%", seed=3, name="item")
    m = module.weight.shape[0]
    assert m * WIDTH + ROWS <= 0.2 * ROWS * WIDTH < (m + 1) * WIDTH + ROWS
    assert (module.scale == 1).all()
    with torch.no_grad():
        module.scale.normal_()
    key = derive_key(3, "item", 0)
    rows = module.weight[[hash_bucket(x, key, m) for x in range(ROWS)]]
    assert torch.equal(module(IDS), rows * module.scale)


def test_memcom_with_bias() -> None:
    module = ec.Embedding(ROWS, WIDTH, method=ec.MemCom(bias=True), budget="30%", name="item")
    with torch.no_grad():
        for number in (module.scale, module.bias):
            number.normal_()
    m = module.weight.shape[0]
    rows = module.weight[[hash_bucket(x, derive_key(0, "item", 0), m) for x in range(ROWS)]]
    expected = rows * module.scale + module.bias * module.direction
    torch.testing.assert_close(module(IDS), expected)
    assert ec.memory(module).total == 4 * (m * WIDTH + 2 * ROWS + WIDTH)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients(bias: bool) -> None:
    plan = ec.MemCom(bias).plan(TableSpec(20, 3, dtype="float64"), 4)
    module = ec.Embedding.from_plan(plan, ec.MemCom(bias))
    ids = torch.tensor([0, 3, 3, 19])
    names = [store.name for store in plan.stores]

    def lookup(*stores: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, stores, strict=True)), ids)

    stores = [torch.randn_like(module.stores()[name]).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lookup, stores)


def test_ids_that_share_a_row_are_told_apart() -> None:
    table = ec.Embedding(50, 4, method="memcom", budget=4 * (50 + 4))
    assert table.weight.shape[0] == 1
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.3)
    target = torch.linspace(-1, 1, 50)[:, None].expand(50, 4)
    for _ in range(200):
        optimizer.zero_grad()
        (table(torch.arange(50)) - target).square().mean().backward()
        optimizer.step()
    assert (table.to_dense() - target).abs().max() < 0.05


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="bias must be True or False, got 1"):
        ec.MemCom(bias=1)
