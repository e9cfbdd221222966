"""The compiled engine equals the reference on generated cases, values and every gradient."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import embcompress.engine.program
import embcompress.engine.reference
from embcompress.engine import Bags, GradientOptions, lookup, lookup_features, ops
from embcompress.engine.encoding import needs_cpu_kernels
from embcompress.plan import (
    Address,
    Code,
    Digit,
    Hash,
    LookupPlan,
    Probe,
    Quantization,
    Store,
)
from tests.engine.devices import DEVICES, to_device
from tests.engine.judging import WEIGHTS, Judge, Result, output_gradient, quantization_steps, run
from tests.plan_cases import Case, make_case, make_feature_cases, pack_bits, with_leaves

CASES, FEATURE_CASES, BLOCK = 2000, 300, 100


pytestmark = pytest.mark.skipif(
    not ops.is_available(),
    reason="the C++ extension is not built, or EMBCOMPRESS_ENGINE=reference is set",
)


def engine(case: Case, sparse: bool = False, device: str = "cpu") -> Tensor:
    case = to_device(case, device)
    return lookup(case.plan, case.stores, case.bags, GradientOptions(sparse=sparse)).cpu()


def may_use_reference(case: Case, device: str) -> bool:
    """Double precision is left to the reference, and what the kernels of a device do not run."""
    dtypes = {store.dtype for store in case.plan.stores}
    weights = case.bags.weights
    if needs_cpu_kernels(case.plan) and not ops.runs_every_plan(torch.device(device)):
        stores = case.plan.stores
        unknown = any(s.stride is not None or s.sparsity is not None for s in stores)
        floats = {store.dtype for store in case.plan.stores if store.is_float}
        # Linear heads are torch's there, in float32, but a maximum is taken after them.
        if unknown or floats != {"float32"} or case.plan.pool == "max":
            return True
    return "float64" in dtypes or (weights is not None and weights.dtype == torch.float64)


def without_reference(*cases: Case, device: str = "cpu") -> AbstractContextManager[object]:
    """The engine may not answer with the very code that it is compared to."""
    if any(may_use_reference(case, device) for case in cases):
        return nullcontext()
    error = AssertionError("the engine fell back to the reference")
    return patch.object(embcompress.engine.program, "lookup_reference", side_effect=error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_generated_cases(first: int, device: str) -> None:
    run_engine = partial(engine, device=device)
    for number in range(first, first + BLOCK):
        case = make_case(number)
        if case.plan.is_dense:  # that is torch's own operator
            continue
        judge, steps = Judge(case), quantization_steps(case)
        with without_reference(case, device=device):
            judge.check(run(case, judge.gradient, run_engine))
            if steps:
                judge.check(run(case, judge.gradient, run_engine, frozen=steps))
            with torch.no_grad():
                judge.check_output(run_engine(case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", range(CASES, CASES + 200, BLOCK))
def test_sparse_gradients(first: int, device: str) -> None:
    """The same numbers, in rows that are sorted and unique."""

    def sparse_engine(case: Case) -> Tensor:
        return engine(case, sparse=True, device=device)

    for number in range(first, first + BLOCK):
        case = make_case(number, dtype="float32")
        if case.plan.is_dense:
            continue
        judge = Judge(case)
        with without_reference(case, device=device):
            result = run(case, judge.gradient, sparse_engine, device=device)
        judge.check(result)
        for name, gradient in result.gradients.items():
            if gradient is not None and gradient.is_sparse and not may_use_reference(case, device):
                rows = gradient._indices()[0]  # autograd drops the mark that they are coalesced
                assert bool((rows[1:] > rows[:-1]).all()), (name, case)


# ----------------------------------------------------------------------------------- features


def run_features(cases: list[Case], gradients: list[Tensor], device: str) -> list[Result]:
    """One call for all features, taken apart again."""
    leaves = [with_leaves(case) for case in cases]
    moved = [to_device(case, device) for case in leaves]
    starts = [0]
    for case in cases:
        starts.append(starts[-1] + case.bags.ids.numel())
    offsets = [case.bags.offsets[:-1] + start for case, start in zip(cases, starts, strict=False)]
    weights = [case.bags.weights for case in moved]
    output = lookup_features(
        [case.plan for case in moved],
        [case.stores for case in moved],
        torch.cat([case.bags.ids for case in moved]),
        torch.cat([*offsets, torch.tensor([starts[-1]])]).to(device),
        None if weights[0] is None else torch.cat(weights),
    ).cpu()
    widths = [case.plan.embedding_dim for case in cases]
    assert output.shape == (cases[0].bags.offsets.numel() - 1, sum(widths))
    if output.requires_grad:
        output.backward(torch.cat(gradients, dim=1).to(output.dtype))
    results = []
    for case, columns in zip(leaves, output.detach().split(widths, dim=1), strict=True):
        found = {name: t.grad for name, t in case.stores.items() if t.requires_grad}
        if case.bags.weights is not None:
            found[WEIGHTS] = case.bags.weights.grad
        results.append(Result(columns, found))
    return results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", range(0, FEATURE_CASES, BLOCK))
def test_features_in_one_call(first: int, device: str) -> None:
    for number in range(first, first + BLOCK):
        cases = make_feature_cases(number)
        judges = [Judge(case) for case in cases]
        # Torch's own operator runs dense tables that are looked up by themselves.
        by_torch = len(cases) == 1 or any(case.plan.pool == "max" for case in cases)
        with without_reference(*cases, device=device):
            results = run_features(cases, [judge.gradient for judge in judges], device)
        for case, judge, result in zip(cases, judges, results, strict=True):
            if not (by_torch and case.plan.is_dense):
                judge.check(result)


def test_features_that_share_a_store_add_their_gradients() -> None:
    table = torch.arange(12.0).reshape(4, 3).requires_grad_()
    plans = [
        LookupPlan(9, 3, (Store("rows", 4, 3),), (Probe("rows", address),), pool="sum")
        for address in (Hash(1, 4), Hash(2, 4), Digit(1, 4))
    ]
    ids = torch.tensor([0, 1, 2, 8, 8, 8, 3, 5, 7])
    output = lookup_features(plans, [{"rows": table}] * 3, ids, torch.tensor([0, 1, 3, 4, 6, 7, 9]))
    output.backward(torch.ones_like(output))
    expected = torch.zeros(4, 3)
    for feature, plan in enumerate(plans):
        part = ids[3 * feature : 3 * feature + 3]
        leaf = table.detach().clone().requires_grad_()
        embcompress.engine.reference.lookup_reference(
            plan, {"rows": leaf}, Bags(part, torch.tensor([0, 3]))
        ).sum().backward()
        expected += leaf.grad
    assert torch.equal(table.grad, expected)


# ------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("first", range(0, 200, BLOCK))
def test_the_number_of_threads_changes_no_bit(first: int) -> None:
    before = torch.get_num_threads()
    try:
        for number in range(first, first + BLOCK):
            case = make_case(number)
            if case.plan.is_dense or may_use_reference(
                case, "cpu"
            ):  # torch's own sums and products
                continue
            gradient, results = output_gradient(case), []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(run(case, gradient, engine))
            for other in results[1:]:
                assert torch.equal(results[0].output, other.output), case
                for name, expected in results[0].gradients.items():
                    actual = other.gradients[name]
                    assert (actual is None) == (expected is None), (name, case)
                    assert actual is None or torch.equal(actual, expected), (name, case)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pool", ["none", "sum", "mean", "max"])
def test_hot_ids_give_the_same_bits_every_time(pool: str, device: str) -> None:
    plan = LookupPlan(1000, 16, (Store("rows", 50, 16),), (Probe("rows", Hash(3, 50)),), pool=pool)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (20_000,), generator=generator)
    ids[torch.rand(len(ids), generator=generator) < 0.9] = 7
    bags = Bags(ids, torch.arange(0, len(ids) + 1, 20))
    stores = {"rows": torch.randn(50, 16, generator=generator)}
    case = Case(0, plan, stores, bags, whole=False)
    run_engine = partial(engine, device=device)
    first = run(case, output_gradient(case), run_engine)
    for _ in range(10):
        again = run(case, output_gradient(case), run_engine)
        assert torch.equal(again.output, first.output)
        assert torch.equal(again.gradients["rows"], first.gradients["rows"])


# ----------------------------------------------------------------------------------- hostility


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_ids_that_change_before_backward_are_refused(bad: int) -> None:
    plan = LookupPlan(10, 4, (Store("rows", 5, 4),), (Probe("rows", Digit(2, 5)),), pool="sum")
    ids = torch.tensor([1, 2, 3])
    rows = torch.randn(5, 4, requires_grad=True)
    output = lookup(plan, {"rows": rows}, Bags(ids, torch.tensor([0, 3])))
    ids.numpy()[1] = bad  # behind autograd's back
    with pytest.raises((IndexError, RuntimeError)):
        output.sum().backward()


@pytest.mark.parametrize("pool", ["sum", "mean", "max"])
def test_a_number_that_is_none_is_not_hidden(pool: str) -> None:
    plan = LookupPlan(3, 1, (Store("rows", 4, 1),), (Probe("rows", Digit(1, 3)),), pool=pool)
    table = torch.tensor([[1.0], [torch.nan], [torch.inf], [0.0]])
    bags = Bags(torch.tensor([0, 1, 2, 0, 2, 0]), torch.tensor([0, 3, 5, 6]))
    output = lookup(plan, {"rows": table}, bags).flatten()
    assert output[0].isnan() and output[1] == torch.inf and output[2] == 1


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "otherwise", [None, Digit(1, 5), Code("codes", 5, Digit(1, 1)), Code("codes", 5, Digit(1, 10))]
)
@pytest.mark.parametrize("pool", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("device", DEVICES)
def test_damaged_codes_read_nothing(
    device: str, pool: str, otherwise: Address | None, quantized: bool
) -> None:
    """A code past its bound gives a zero vector, and never a row outside the store."""
    steps = Store("steps", 1, 1)
    rows = Store("rows", 5, 4, "uint8", Quantization("steps")) if quantized else Store("rows", 5, 4)
    plan = LookupPlan(
        10,
        4,
        stores=(rows, Store("codes", 10, 1, "uint16"), *([steps] if quantized else [])),
        probes=(Probe("rows", Code("codes", 5, Digit(1, 10), otherwise=otherwise)),),
        pool=pool,
    )
    codes = [0, 1, 2, 3, 4, 5, 60_000, 65_534, 65_535, 4]
    stores = {"codes": pack_bits(codes, 16), "steps": torch.ones(1, 1)}
    stores["rows"] = torch.full((20,), 255).byte() if quantized else torch.ones(5, 4)
    bags = Bags(torch.arange(10), torch.arange(11))
    case = Case(0, plan, stores, bags, whole=True)
    judge = Judge(case)
    judge.check(run(case, judge.gradient, partial(engine, device=device)))
    zero = [not row.any() for row in engine(case, device=device)]
    # An absent id reads its own code again, which is absent, or the code of id 0, which is not.
    absent = otherwise is None or otherwise == Code("codes", 5, Digit(1, 10))
    assert zero == [False] * 5 + [True] * 3 + [absent, False]
