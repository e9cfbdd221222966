"""The reference against a scalar loop, gradcheck, and what it promises about precision."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from embcompress.engine import Bags
from embcompress.engine.reference import lookup_reference
from embcompress.plan import (
    Code,
    Digit,
    Hash,
    Linear,
    LookupPlan,
    Probe,
    Quantization,
    Scale,
    Sign,
    Store,
    Weight,
)
from tests.engine.judging import check, reference, run
from tests.engine.scalar_loop import ScalarLoop
from tests.plan_cases import Case, make_case, pack_bits

POOLS = ("none", "sum", "mean", "max")
HALVES = ("float16", "bfloat16")


def assert_equals_the_loop(case: Case) -> None:
    bags = case.bags
    loop = ScalarLoop(case.plan, case.stores)
    weights = None if bags.weights is None else bags.weights.double().tolist()
    vectors = loop.lookup(bags.ids.tolist(), bags.offsets.tolist(), weights)
    expected = torch.tensor(vectors, dtype=torch.float64).reshape(-1, case.plan.embedding_dim)
    torch.testing.assert_close(reference(case), expected, rtol=1e-9, atol=1e-9, msg=str(case))


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_generated_cases_equal_a_scalar_loop(first: int) -> None:
    for number in range(first, first + 50):
        assert_equals_the_loop(make_case(number, dtype="float64", small=True))


ID_LISTS = st.lists(st.lists(st.integers(0, 2**63 - 1), max_size=4), max_size=4)


@settings(deadline=None, max_examples=150)
@given(number=st.integers(0, 10**9), id_lists=ID_LISTS, int32=st.booleans())
def test_any_bags_equal_a_scalar_loop(number: int, id_lists: list[list[int]], int32: bool) -> None:
    case = make_case(number, dtype="float64", small=True)
    n = case.plan.num_embeddings
    ids = torch.tensor([id % n for bag in id_lists for id in bag], dtype=torch.int64)
    ends = torch.tensor([0, *(len(bag) for bag in id_lists)]).cumsum(0)
    if int32 and n <= 2**31:
        ids, ends = ids.int(), ends.int()
    if case.plan.pool == "none":
        ends = ids
    assert_equals_the_loop(Case(number, case.plan, case.stores, Bags(ids, ends), case.whole))


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_every_dtype_is_as_exact_as_its_rounding(first: int) -> None:
    for number in range(first, first + 100):
        check(make_case(number), reference)


# ---------------------------------------------------------------------------------- gradients

SCALES: dict[str, Scale | None] = {
    "none": None,
    "sign": Sign(11),
    "weight": Weight("scales", Hash(12, 5), column=1),
}


def differentiable_plan(combine: str, pool: str, scale: Scale | None, head: bool) -> LookupPlan:
    """Two probes into a float and a packed store, one of them through codes."""
    width = 5 if combine == "concat" else 3
    second = 2 if combine == "concat" else 3
    return LookupPlan(
        20,
        4 if head else width,
        stores=(
            Store("rows", 6, 3, "float64"),
            Store("packed", 4, second, "uint4", Quantization("steps", "lows")),
            Store("steps", 4, 1, "float64"),
            Store("lows", 4, 1, "float64"),
            Store("scales", 5, 2, "float64"),
            Store("codes", 20, 1, "uint3"),
            *([Store("projection", 4, width, "float64")] if head else []),
        ),
        probes=(
            Probe("rows", Digit(1, 4), scale, offset=2),
            Probe("packed", Code("codes", 4, Digit(1, 20)), scale),
        ),
        combine=combine,
        head=Linear("projection") if head else None,
        pool=pool,
        padding_idx=7,
    )


def stores_for(plan: LookupPlan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    stores = {}
    for store in plan.stores:
        if store.is_float:
            values = torch.randn(store.rows, store.width, generator=generator, dtype=torch.float64)
            stores[store.name] = values.requires_grad_()
        elif store.quantization is None:
            stores[store.name] = pack_bits([0, 1, 2, 3, 7] * 4, store.bits)
        else:
            codes = torch.randint(0, 16, (store.rows * store.width,), generator=generator)
            stores[store.name] = pack_bits(codes.tolist(), store.bits)
    return stores


IDS = torch.tensor([0, 7, 3, 3, 19, 7, 7, 12, 4, 0])
OFFSETS = torch.tensor([0, 0, 5, 7, 10])


def assert_gradients(plan: LookupPlan, weights: Tensor | None = None) -> None:
    stores = stores_for(plan)
    names = [name for name, tensor in stores.items() if tensor.requires_grad]

    def run_on(*tensors: Tensor) -> Tensor:
        *values, per_sample = tensors if weights is not None else (*tensors, None)
        inputs = {**stores, **dict(zip(names, values, strict=True))}
        return lookup_reference(plan, inputs, Bags(IDS, OFFSETS, per_sample))

    inputs = [stores[name] for name in names]
    assert gradcheck(run_on, [*inputs, *([] if weights is None else [weights])])


@pytest.mark.parametrize(
    ("combine", "pool", "scale", "head"),
    list(itertools.product(("sum", "mul", "concat"), POOLS, SCALES, (False, True))),
)
def test_gradients_are_those_of_finite_differences(
    combine: str, pool: str, scale: str, head: bool
) -> None:
    assert_gradients(differentiable_plan(combine, pool, SCALES[scale], head))


@pytest.mark.parametrize("combine", ["sum", "mul", "concat"])
@pytest.mark.parametrize("head", [False, True])
def test_gradients_of_per_sample_weights(combine: str, head: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(len(IDS), generator=generator, dtype=torch.float64).requires_grad_()
    assert_gradients(differentiable_plan(combine, "sum", SCALES["weight"], head), weights)


@pytest.mark.parametrize("pool", POOLS)
def test_padding_gives_no_gradient(pool: str) -> None:
    plan = differentiable_plan("sum", pool, SCALES["weight"], False)
    stores = stores_for(plan)
    ids, offsets = torch.full((4,), 7), torch.tensor([0, 1, 4])
    output = lookup_reference(plan, stores, Bags(ids, offsets))
    assert torch.equal(output, torch.zeros(4 if pool == "none" else 2, 3, dtype=torch.float64))
    output.backward(torch.ones_like(output))
    for tensor in stores.values():
        assert tensor.grad is None or not tensor.grad.any()


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_sparse_gradients_equal_dense_ones(first: int) -> None:
    for number in range(first, first + 50):
        case = make_case(number, dtype="float64")
        gradient = torch.ones_like(reference(case))
        dense = run(case, gradient)
        sparse = run(case, gradient, lambda case: reference(case, sparse=True))
        for name, expected in dense.gradients.items():
            actual = sparse.gradients[name]
            assert (actual is None) == (expected is None), case
            if actual is not None and expected is not None:
                torch.testing.assert_close(actual.to_dense(), expected, msg=str(case))


# ---------------------------------------------------------------------- what the text promises


def table_plan(rows: int, width: int, dtype: str, pool: str) -> LookupPlan:
    return LookupPlan(
        rows, width, (Store("rows", rows, width, dtype),), (Probe("rows", Digit(1, rows)),),
        pool=pool,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_halves_are_added_up_in_float32(dtype: str, pool: str) -> None:
    """A half-precision sum of 10^5 numbers stops growing; ours is off by a rounding."""
    count, half = 10**5, getattr(torch, dtype)
    table = torch.rand(16, 4, generator=torch.Generator().manual_seed(0)).to(half) / 4 + 0.1
    ids = torch.arange(count) % 16
    plan = table_plan(16, 4, dtype, pool)
    table.requires_grad_()
    output = lookup_reference(plan, {"rows": table}, Bags(ids, torch.tensor([0, count])))
    total = table.detach().double()[ids].sum(0) / (count if pool == "mean" else 1)
    bound = (count * torch.finfo(torch.float32).eps + torch.finfo(half).eps / 2) * total
    assert output.dtype == half
    assert ((output[0].double() - total).abs() <= bound).all()
    output.backward(torch.ones_like(output))
    share = count / 16 / (count if pool == "mean" else 1)
    torch.testing.assert_close(table.grad, torch.full_like(table.grad, share), rtol=0.01, atol=0)


def test_the_first_of_equal_maxima_takes_the_gradient() -> None:
    table = torch.tensor([[1.0, 5.0], [3.0, 5.0], [3.0, 2.0]], requires_grad=True)
    plan = table_plan(3, 2, "float32", "max")
    bags = Bags(torch.tensor([2, 1, 0, 1]), torch.tensor([0, 4]))
    output = lookup_reference(plan, {"rows": table}, bags)
    assert output.tolist() == [[3.0, 5.0]]
    output.backward(torch.tensor([[1.0, 10.0]]))
    assert table.grad is not None
    assert table.grad.tolist() == [[0, 0], [0, 10], [1, 0]]


@pytest.mark.parametrize("pool", ["sum", "mean", "max"])
def test_a_number_that_is_none_is_not_hidden(pool: str) -> None:
    table = torch.tensor([[1.0], [torch.nan], [torch.inf]])
    plan = table_plan(3, 1, "float32", pool)
    bags = Bags(torch.tensor([0, 1, 2, 0, 2, 0]), torch.tensor([0, 3, 5, 6]))
    output = lookup_reference(plan, {"rows": table}, bags).flatten()
    assert output[0].isnan() and output[1] == torch.inf and output[2] == 1


def test_a_bag_of_minus_infinity_is_not_an_empty_bag() -> None:
    table = torch.full((2, 1), -torch.inf)
    bags = Bags(torch.tensor([0, 1]), torch.tensor([0, 0, 2]))
    output = lookup_reference(table_plan(2, 1, "float32", "max"), {"rows": table}, bags)
    assert output.flatten().tolist() == [0, -torch.inf]


def test_an_absent_code_makes_a_product_zero() -> None:
    plan = LookupPlan(
        2, 1,
        stores=(Store("a", 2, 1), Store("b", 1, 1), Store("codes", 2, 1, "uint1")),
        probes=(Probe("a", Digit(1, 2)), Probe("b", Code("codes", 1, Digit(1, 2)))),
        combine="mul",
    )  # fmt: skip
    stores = {"a": torch.tensor([[2.0], [3.0]]), "b": torch.tensor([[5.0]])}
    stores["codes"] = pack_bits([0, 1], 1)
    ids = torch.tensor([0, 1])
    assert lookup_reference(plan, stores, Bags(ids, ids)).tolist() == [[10.0], [0.0]]
