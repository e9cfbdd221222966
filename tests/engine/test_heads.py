"""Heads that are not linear: the scalar loop, finite differences, and both engines."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import embcompress.engine.program
from embcompress.engine import Bags, GradientOptions, Program, lookup, ops
from embcompress.engine.reference import lookup_reference
from embcompress.plan import (
    Code,
    Digit,
    Hash,
    HashFeatures,
    LookupPlan,
    Network,
    Pool,
    Probe,
    Sign,
    Store,
    TensorTrain,
    Weight,
)
from tests.engine.scalar_loop import ScalarLoop
from tests.plan_cases import pack_bits

POOLS: tuple[Pool, ...] = ("none", "sum", "mean", "max")
KINDS = ("train", "network", "hashes")
IDS = torch.tensor([0, 7, 3, 3, 19, 7, 7, 12, 4, 0])
OFFSETS = torch.tensor([0, 0, 5, 7, 10])


def train_plan(dtype: str) -> LookupPlan:
    """Three cores: one signed, one read through codes or absent, one of rows that overlap."""
    return LookupPlan(
        20,
        12,
        stores=(
            Store("first", 6, 6, dtype),
            Store("second", 4, 12, dtype),
            Store("third", 9, 6, dtype, stride=2),
            Store("codes", 20, 1, "uint3"),
        ),
        probes=(
            Probe("first", Digit(1, 4), Sign(11), offset=2),
            Probe("second", Code("codes", 4, Digit(1, 20))),
            Probe("third", Hash(5, 9)),
        ),
        combine="concat",
        head=TensorTrain((2, 2, 3), (3, 2)),
    )


def network_plan(dtype: str) -> LookupPlan:
    """Two layers over a weighted sum of two rows."""
    return LookupPlan(
        20,
        4,
        stores=(
            Store("rows", 8, 5, dtype),
            Store("scales", 20, 1, dtype),
            Store("inner", 7, 5, dtype),
            Store("inner_bias", 1, 7, dtype),
            Store("outer", 4, 7, dtype),
            Store("outer_bias", 1, 4, dtype),
        ),
        probes=(
            Probe("rows", Hash(1, 8), Weight("scales", Digit(1, 20))),
            Probe("rows", Hash(2, 8)),
        ),
        head=Network(("inner", "outer"), ("inner_bias", "outer_bias")),
    )


def hashes_plan(dtype: str) -> LookupPlan:
    plan = network_plan(dtype)
    return LookupPlan(
        20,
        4,
        stores=plan.stores[2:],
        probes=(),
        head=Network(("inner", "outer"), ("inner_bias", "outer_bias"), HashFeatures(9, 5, 1000)),
    )


def make_plan(kind: str, pool: Pool, dtype: str = "float64") -> LookupPlan:
    make = {"train": train_plan, "network": network_plan, "hashes": hashes_plan}[kind]
    return make(dtype).with_pool(pool, padding_idx=7)


def stores_for(plan: LookupPlan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    stores = {}
    for store in plan.stores:
        if store.is_float:
            values = torch.randn(store.shape, generator=generator, dtype=torch.float64)
            stores[store.name] = values.to(getattr(torch, store.dtype)).requires_grad_()
        else:
            stores[store.name] = pack_bits([0, 1, 2, 3, 7] * 4, store.bits)
    return stores


def weights_for(pool: Pool, dtype: torch.dtype = torch.float64) -> Tensor | None:
    generator = torch.Generator().manual_seed(4)
    if pool != "sum":
        return None
    return (
        torch.randn(len(IDS), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    )


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_a_scalar_loop(kind: str, pool: Pool) -> None:
    plan, weights = make_plan(kind, pool), weights_for(pool)
    stores = stores_for(plan)
    factors = None if weights is None else weights.tolist()
    vectors = ScalarLoop(plan, stores).lookup(IDS.tolist(), OFFSETS.tolist(), factors)
    expected = torch.tensor(vectors, dtype=torch.float64)
    actual = lookup_reference(plan, stores, Bags(IDS, OFFSETS, weights))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    if pool == "none":
        assert not actual[IDS == 7].any() and actual[IDS != 7].any(1).sum() >= 5


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, pool: Pool) -> None:
    plan, weights = make_plan(kind, pool), weights_for(pool)
    stores = stores_for(plan)
    names = [name for name, tensor in stores.items() if tensor.requires_grad]

    def run(*tensors: Tensor) -> Tensor:
        values = {**stores, **dict(zip(names, tensors, strict=False))}
        per_sample = None if weights is None else tensors[-1]
        return lookup_reference(plan, values, Bags(IDS, OFFSETS, per_sample))

    inputs = [stores[name] for name in names]
    assert gradcheck(run, [*inputs, *([] if weights is None else [weights])])


@pytest.mark.skipif(not ops.is_available(), reason="the C++ extension is not built")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", ["train", "network"])
def test_what_kernels_gather_gives_the_same(kind: str, pool: Pool, sparse: bool) -> None:
    plan, results = make_plan(kind, pool, "float32"), []
    program = Program((plan,))
    assert program.is_compiled
    if not program.runs_on(torch.device("cpu")):
        pytest.skip("rows overlap, and the emulated CUDA kernels read none that do")
    error = AssertionError("the engine fell back to the reference")
    for engine in ("reference", "kernels"):
        stores, weights = stores_for(plan), weights_for(pool, torch.float32)
        bags = Bags(IDS, OFFSETS, weights)
        if engine == "reference":
            output = lookup_reference(plan, stores, bags)
        else:
            with patch.object(embcompress.engine.program, "lookup_reference", side_effect=error):
                output = lookup(plan, stores, bags, GradientOptions(sparse=sparse))
        output.pow(2).sum().backward()
        leaves = [*stores.values(), *([] if weights is None else [weights])]
        gradients = [leaf.grad.to_dense() for leaf in leaves if leaf.requires_grad]
        results.append([output, *gradients])
        for name in plan.head_stores:
            assert not stores[name].grad.is_sparse
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_computed_in_float32(kind: str, dtype: str) -> None:
    plan = make_plan(kind, "sum", dtype)
    stores = {name: t.detach() for name, t in stores_for(plan).items()}
    wide = {n: t.double() if t.is_floating_point() else t for n, t in stores.items()}
    exact = lookup(make_plan(kind, "sum"), wide, Bags(IDS, OFFSETS))
    found = lookup(plan, stores, Bags(IDS, OFFSETS))
    half = getattr(torch, dtype)
    assert found.dtype == half
    torch.testing.assert_close(found, exact.to(half), rtol=2 * torch.finfo(half).eps, atol=1e-3)
