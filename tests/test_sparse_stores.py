"""Sparse stores: their layouts, masks, and tables that hold them in training and deployed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import embcompress as ec
from embcompress.engine import Bags, ops
from embcompress.engine.reference import lookup_reference
from embcompress.layouts.sparse import (
    even_mask,
    mask_of_largest,
    pack_sparse,
    read_mask,
    sparse_store,
    unpack_sparse,
)
from embcompress.plan import Digit, LookupPlan, Probe, Store

ROWS, WIDTH = 90, 6
IDS = torch.arange(ROWS)
STORED = (1, 23, 54, 200, ROWS * WIDTH)


def plan_of(stored: int, dtype: str = "float32") -> LookupPlan:
    stores = sparse_store("weight", ROWS, WIDTH, stored, dtype)
    return LookupPlan(ROWS, WIDTH, stores, (Probe("weight", Digit(1, ROWS)),))


def module_of(stored: int, **arguments: object) -> ec.Embedding:
    torch.manual_seed(stored)
    return ec.Embedding.from_plan(plan_of(stored), **arguments)


def kept(module: ec.Embedding) -> Tensor:
    return read_mask(module.weight_index, module.plan.store("weight"))


# ------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("rows", [1, 7, 1000, 10**6])
@pytest.mark.parametrize("width", [1, 8, 64, 3000])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_layout_is_the_smallest_and_fits(rows: int, width: int, density: float) -> None:
    numbers = rows * width
    stored = min(max(1, int(density * numbers)), 2**31 - 1)
    stores = sparse_store("weight", rows, width, stored)
    LookupPlan(rows, width, stores, (Probe("weight", Digit(1, rows)),))  # which checks them
    weight, index, starts = stores
    assert weight.bytes == 4 * stored
    mask = numbers / 8
    starts_of_mask = -(-rows // max(1, 512 // width)) * stored.bit_length() / 8
    assert index.bytes + starts.bytes <= mask + starts_of_mask + 2
    if 10 * stored < numbers and width <= 64 and rows >= 1000:
        assert index.bytes + starts.bytes < mask


def test_bytes_rise_with_what_is_kept() -> None:
    sizes = [sum(s.bytes for s in sparse_store("w", 50, 7, k)) for k in range(1, 351)]
    assert sizes == sorted(sizes)


def test_at_most_so_many_numbers_are_kept() -> None:
    with pytest.raises(ec.PlanError, match="keeps 1 to 2147483647 numbers"):
        sparse_store("weight", 2**31, 2, 2**31)


# --------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("stored", STORED)
def test_an_even_mask_keeps_as_much_of_every_row(stored: int) -> None:
    store = plan_of(stored).store("weight")
    bits = read_mask(even_mask(store), store)
    assert int(bits.sum()) == stored
    for parts in (bits.sum(1), bits.sum(0)):
        assert int(parts.max() - parts.min()) <= max(1, stored // 20)
    assert int(bits.sum(1).max() - bits.sum(1).min()) <= 1


def test_a_mask_of_the_largest() -> None:
    values = torch.tensor([[1.0, -3.0, 0.5], [2.0, -2.0, float("nan")]])
    store = Store("w", 2, 3)

    def kept_of(stored: int) -> list[list[bool]]:
        return read_mask(mask_of_largest(values.abs(), stored), store).tolist()

    assert kept_of(1) == [[False, False, False], [False, False, True]]
    assert kept_of(3) == [[False, True, False], [True, False, True]]  # of equal ones the first
    assert kept_of(6) == [[True] * 3] * 2


@pytest.mark.parametrize("stored", STORED)
def test_packing_and_back(stored: int) -> None:
    generator = torch.Generator().manual_seed(stored)
    plan = plan_of(stored)
    latents = torch.randn(ROWS, WIDTH, generator=generator)
    mask = mask_of_largest(torch.randn(ROWS, WIDTH, generator=generator), stored)
    store = plan.store("weight")
    bits = read_mask(mask, store)
    packed = pack_sparse(plan, store, {"weight": latents, "weight_index": mask})
    assert torch.equal(packed["weight"], latents[bits])
    assert [packed[s.name].nbytes for s in plan.stores] == [s.bytes for s in plan.stores]
    back = unpack_sparse(plan, store, packed)
    assert torch.equal(back["weight"], latents * bits)
    assert torch.equal(back["weight_index"], mask)


def test_a_mask_of_another_number_is_refused() -> None:
    module = module_of(54)
    module.weight_index.fill_(255)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="keeps 540 numbers, and the plan 54"):
        ec.deploy(module)
    assert module.latents() == ("weight",)
    assert torch.equal(module.state_dict()["weight"], before["weight"])
    with pytest.raises(ValueError, match="need a mask of 68 bytes as 'weight_index', got 8"):
        ec.deploy(module_of(9)).load_stores({"weight": torch.zeros(ROWS, WIDTH)})


# -------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("stored", STORED)
def test_lookups_read_what_the_mask_keeps(stored: int) -> None:
    module = module_of(stored)
    with torch.no_grad():
        module.weight.fill_(3.0)  # also where nothing is kept
    expected = torch.where(kept(module), 3.0, 0.0)
    assert torch.equal(module(IDS), expected)
    assert int((expected != 0).sum()) == stored


@pytest.mark.parametrize("engine", ["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("stored", STORED)
def test_a_deployed_lookup_is_the_trained_one(
    stored: int, dtype: torch.dtype, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "reference":
        monkeypatch.setattr(ops, "is_available", lambda: False)
    module = module_of(stored).to(dtype)
    expected = module(IDS).detach()
    assert ec.memory(module).total == module.plan.bytes
    mask_bytes = -(-ROWS * WIDTH // 8)
    index = module.plan.store("weight_index").bytes
    latents = ROWS * WIDTH * dtype.itemsize - stored * dtype.itemsize
    assert ec.memory(module).training == latents + max(0, mask_bytes - index)
    ec.deploy(module)
    assert module.latents() == () and module.weight.shape == (stored,)
    assert torch.equal(module(IDS), expected)
    assert torch.equal(module(IDS.flip(0)), expected.flip(0))
    assert sum(t.nbytes for t in module.stores().values()) == module.plan.bytes
    assert ec.memory(module).total == module.plan.bytes and ec.memory(module).training == 0


def test_only_what_is_kept_is_trained() -> None:
    module = module_of(200)
    bits = kept(module)
    module(IDS).square().sum().backward()
    assert torch.equal(module.weight.grad != 0, bits)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(module.weight.detach() != 0, bits)


@pytest.mark.parametrize("stored", STORED)
def test_gradients_are_those_of_finite_differences(stored: int) -> None:
    module = module_of(stored).double()
    for _ in range(2):
        stores = module.stores()

        def run(values: Tensor, stores: dict[str, Tensor] = stores) -> Tensor:
            return lookup_reference(module.plan, {**stores, "weight": values}, Bags(IDS, IDS))

        assert gradcheck(run, (module.weight.detach().requires_grad_(),))
        ec.deploy(module)


@pytest.mark.parametrize("saved_deployed", [False, True])
@pytest.mark.parametrize("own_deployed", [False, True])
@pytest.mark.parametrize("stored", [23, 200])
def test_a_module_takes_the_form_of_what_it_loads(
    stored: int, saved_deployed: bool, own_deployed: bool
) -> None:
    saved, own = module_of(stored), module_of(stored, deployed=own_deployed)
    saved.weight_index.copy_(mask_of_largest(torch.randn(ROWS, WIDTH), stored))
    expected = saved(IDS).detach()
    if saved_deployed:
        ec.deploy(saved)
    own.load_state_dict(saved.state_dict())
    assert own.latents() == saved.latents() and torch.equal(own(IDS), expected)
    other = module_of(stored, deployed=own_deployed)  # keeps its form
    other.load_stores({n: t for n, t in saved.stores().items() if n != "weight_starts"}
                      if not saved_deployed else saved.stores())  # fmt: skip
    assert other.latents() == (() if own_deployed else ("weight",))
    assert torch.equal(other(IDS), expected)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "rowwise_adagrad"])
def test_fused_optimizers_train_what_is_kept(name: str) -> None:
    module = module_of(200)
    bits, before = kept(module), module.weight.detach().clone()
    ec.fuse_optimizer(module, name, lr=0.1, weight_decay=0.1)
    for first in (0, 30):
        module(IDS[first : first + 40]).square().sum().backward()
    changed = module.weight.detach() != before
    assert torch.equal(changed[:70], bits[:70]) and not changed[70:].any()


def test_damaged_parts_never_read_past_the_end() -> None:
    generator = torch.Generator().manual_seed(0)
    for stored in STORED:
        module = ec.deploy(module_of(stored))
        for _ in range(20):
            for name in ("weight_index", "weight_starts"):
                getattr(module, name).random_(0, 256, generator=generator)
            values = set(module.weight.tolist()) | {0.0}
            assert set(module(IDS).flatten().tolist()) <= values
