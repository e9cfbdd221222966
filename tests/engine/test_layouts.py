"""Shapes that kernels treat apart: wide rows, many features, hot rows, tied tables."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from embcompress.engine import Bags, GradientOptions, Program, lookup, ops
from embcompress.engine.fused import FusedStores, UpdateRule
from embcompress.engine.reference import lookup_reference
from embcompress.plan import (
    Code,
    Digit,
    Hash,
    LookupPlan,
    Probe,
    Quantization,
    Sign,
    Slot,
    Store,
    Weight,
)
from tests.engine.devices import DEVICES, to_device
from tests.engine.judging import Judge, run
from tests.engine.test_generated import run_features
from tests.plan_cases import Case

pytestmark = [
    pytest.mark.skipif(not ops.is_available(), reason="the C++ extension is not built"),
    pytest.mark.parametrize("device", DEVICES),
]


def engine(case: Case, device: str) -> Tensor:
    moved = to_device(case, device)
    return lookup(moved.plan, moved.stores, moved.bags, GradientOptions()).cpu()


def make_case(plan: LookupPlan, lengths: list[int], seed: int = 0) -> Case:
    """Normal numbers for the stores, any codes, uniform ids in bags of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    stores = {}
    for store in plan.stores:
        if store.is_float:
            values = torch.randn(store.rows, store.width, generator=generator)
            stores[store.name] = values.to(getattr(torch, store.dtype))
        else:
            stores[store.name] = torch.randint(0, 256, (store.bytes,), generator=generator).byte()
    ids = torch.randint(0, plan.num_embeddings, (sum(lengths),), generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Case(seed, plan, stores, Bags(ids, offsets), whole=False)


def check(case: Case, device: str) -> None:
    judge = Judge(case)
    judge.check(run(case, judge.gradient, partial(engine, device=device)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint4"])
@pytest.mark.parametrize("combine", ["sum", "mul"])
@pytest.mark.parametrize("width", [129, 132, 260, 1000])
def test_rows_wider_than_a_warp(device: str, width: int, combine: str, dtype: str) -> None:
    stores = [Store("steps", 1, width), Store("other", 7, width)]
    if dtype == "uint4":
        stores.append(Store("rows", 30, width, dtype, Quantization("steps")))
    else:
        stores = [Store("other", 7, width, dtype), Store("rows", 30, width, dtype)]
    probes = (Probe("rows", Hash(1, 30)), Probe("other", Digit(3, 7)))
    plan = LookupPlan(50, width, tuple(stores), probes, combine=combine, pool="mean")
    check(make_case(plan, [0, 3, 1, 40, 0, 2]), device)


def test_a_bag_of_many_ids_and_rows_that_all_touch(device: str) -> None:
    """Sums over thousands of touches of one row are made of partial sums of partial sums."""
    stores = (
        Store("rows", 3, 8, "uint8", Quantization("steps", "lows")),
        Store("steps", 1, 8), Store("lows", 1, 8), Store("scales", 2, 3),
    )  # fmt: skip
    probe = Probe("rows", Digit(1, 3), Weight("scales", Digit(1, 2), 2))
    case = make_case(LookupPlan(1000, 8, stores, (probe,), pool="sum"), [1, 20_000, 0, 5, 300])
    check(case, device)


@pytest.mark.parametrize("weighted", [False, True])
def test_probes_that_overlap_are_combined_for_each_id(device: str, weighted: bool) -> None:
    """Probes first, then ids: the bits do not depend on where a block of ids ends."""
    stores = (Store("wide", 60, 33), Store("narrow", 29, 1), Store("end", 31, 16, "float16"))
    probes = (
        Probe("wide", Digit(1, 60)),
        Probe("narrow", Hash(1, 29), column=10),
        Probe("end", Hash(2, 31), Sign(3), column=17),
        Probe("end", Hash(4, 31), column=17),
        Probe("wide", Hash(5, 60), column=0),
    )
    case = make_case(LookupPlan(10_000, 33, stores, probes, pool="sum"), [7] * 500 + [0, 300, 1])
    if weighted:
        weights = torch.randn(case.bags.ids.numel(), generator=torch.Generator().manual_seed(1))
        case = replace(case, bags=replace(case.bags, weights=weights))
    check(case, device)
    with torch.no_grad():
        pooled = engine(case, device)
        each = replace(case.bags, weights=None)
        vectors = engine(replace(case, plan=case.plan.with_pool("none", None), bags=each), device)
    if weighted:
        vectors = vectors * weights[:, None]
    ends = case.bags.offsets.tolist()
    for bag, (begin, end) in enumerate(pairwise(ends)):
        expected = torch.zeros(33)
        for vector in vectors[begin:end]:
            expected += vector
        assert torch.equal(pooled[bag], expected), bag


def test_stores_that_begin_at_one_address(device: str) -> None:
    """Slices of a tensor, one longer than the other, which small stores' copies keep apart.

    Six columns: the kernel that reads four at once makes no copies.
    """
    stores = (Store("few", 3, 6), Store("all", 40, 6), Store("other", 10, 6))
    probes = (Probe("few", Digit(1, 3)), Probe("all", Digit(1, 40)), Probe("other", Hash(1, 10)))
    plan = LookupPlan(1000, 6, stores, probes, pool="sum")
    case = make_case(plan, [20] * 200)
    table = torch.arange(240.0).reshape(40, 6)
    other = -torch.arange(60.0).reshape(10, 6)
    moved = table.to(device)
    tensors = {"few": moved[:3], "all": moved, "other": other.to(device)}
    bags = to_device(case, device).bags
    expected = lookup_reference(
        plan, {"few": table[:3], "all": table, "other": other}, case.bags, sparse=False
    )
    assert torch.equal(lookup(plan, tensors, bags).cpu(), expected)


LENGTHS = [3, 0, 1, 1, 70, 2, 0, 0, 9] * 20


def weighted_case(plan: LookupPlan) -> Case:
    case = make_case(plan, LENGTHS)
    weights = torch.randn(case.bags.ids.numel(), generator=torch.Generator().manual_seed(1))
    return replace(case, bags=replace(case.bags, weights=weights))


@pytest.mark.parametrize("combine", ["sum", "mul"])
@pytest.mark.parametrize("width", [4, 64, 132])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_few_rows_of_floats(device: str, count: int, width: int, combine: str) -> None:
    """Hashed, coded with absent ids, in slots: one to four of them have a kernel of their own."""
    stores = (
        Store("rows", 40, width),
        Store("codes", 300, 1, "uint5"),
        Store("tags", 20, 2, "uint9"),
    )
    addresses = [
        Hash(1, 40), Code("codes", 31, Digit(1, 300)), Digit(3, 40),
        Slot("tags", 40, Hash(2, 20), Digit(1, 300), otherwise=Hash(3, 7)), Hash(4, 40),
    ]  # fmt: skip
    probes = tuple(Probe("rows", address) for address in addresses[:count])
    used = {"rows", *(["codes"] if count > 1 else []), *(["tags"] if count > 3 else [])}
    stores = tuple(store for store in stores if store.name in used)
    check(weighted_case(LookupPlan(300, width, stores, probes, combine, pool="sum")), device)
    check(make_case(LookupPlan(300, width, stores, probes, combine, pool="mean"), LENGTHS), device)


@pytest.mark.parametrize("bits", [2, 8, 11, 17])
@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("part", [1, 2, 4, 16, 36])
def test_rows_of_floats_side_by_side(device: str, part: int, each: int, bits: int) -> None:
    """Codebooks of 1 to 36 columns, one to three of which are added up."""
    parts, rows = 5, min((1 << bits) - 1, 50)
    codes = Store("codes", 300, parts * each, f"uint{bits}")
    books = [Store(f"book_{p}", rows, part) for p in range(parts)]
    probes = tuple(
        Probe(f"book_{p}", Code("codes", rows, Digit(1, 300), p * each + e), column=p * part)
        for p in range(parts)
        for e in range(each)
    )
    plan = LookupPlan(300, parts * part, (codes, *books), probes, pool="sum")
    check(weighted_case(plan), device)


@pytest.mark.parametrize("num_features", [1, 40])
def test_many_features_and_long_plans(device: str, num_features: int) -> None:
    """Plans that do not fit the arguments of a launch; features of different kinds in one call."""
    cases = []
    for feature in range(num_features):
        width = (4, 16, 5, 64)[feature % 4]
        count = 12 if num_features == 1 else 1 + feature % 3
        probes = tuple(Probe("rows", Hash(feature + t, 40)) for t in range(count))
        combine = ("sum", "mul")[feature % 2]
        plan = LookupPlan(90, width, (Store("rows", 40, width),), probes, combine, pool="sum")
        cases.append(make_case(plan, [2, 0, 1, 5, 3], seed=feature))
    judges = [Judge(case) for case in cases]
    results = run_features(cases, [judge.gradient for judge in judges], device)
    for judge, result in zip(judges, results, strict=True):
        judge.check(result)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_codebooks_that_are_hot(device: str, dtype: str) -> None:
    """Small stores that a block reads many times over."""
    stores, probes = [Store("codes", 500, 4, "uint4"), Store("steps", 1, 1)], []
    for part in range(4):
        quantization = None if dtype == "float32" else Quantization("steps")
        stores.append(Store(f"book_{part}", 16, 8, dtype, quantization))
        probes.append(Probe(f"book_{part}", Code("codes", 15, Digit(1, 500), part)))
    used = stores if dtype == "uint8" else [s for s in stores if s.name != "steps"]
    plan = LookupPlan(500, 32, tuple(used), tuple(probes), combine="concat", pool="sum")
    check(make_case(plan, [7] * 900), device)


def test_atomics_give_the_same_up_to_rounding(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBCOMPRESS_CUDA_BACKWARD", "atomic")
    stores = (Store("rows", 20, 12), Store("other", 9, 12), Store("scales", 4, 1))
    probes = (
        Probe("rows", Hash(1, 20), Weight("scales", Hash(2, 4))), Probe("other", Digit(1, 9)),
    )  # fmt: skip
    plan = LookupPlan(300, 12, stores, probes, combine="mul", pool="mean", padding_idx=3)
    check(make_case(plan, [3, 0, 50, 1, 7]), device)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("width", [5, 64, 200])
@pytest.mark.parametrize("probes", [1, 2])
def test_updates_are_those_of_the_sparse_gradient(
    device: str, name: str, width: int, probes: int
) -> None:
    """One probe is updated as soon as a row is complete, a product after all rows are."""
    stores = tuple(Store(f"s{t}", 30, width) for t in range(probes))
    read = tuple(Probe(f"s{t}", Hash(t, 30)) for t in range(probes))
    plan = LookupPlan(100, width, stores, read, combine="mul", pool="sum")
    case = make_case(plan, [2, 0, 9, 1, 70])
    rule = UpdateRule(name, 0.1, 1e-8, 0.01, (0.9, 0.99))
    moved = to_device(case, device)
    tensors = [moved.stores[store.name].clone() for store in stores]
    states = [rule.new_states(tensor) for tensor in tensors]
    program = Program([plan])
    expected = [case.stores[store.name].clone() for store in stores]
    expected_states = [rule.new_states(tensor)[1:] for tensor in expected]
    for step in (1, 2):
        fused = FusedStores(
            rule,
            list(range(probes)),
            [state[1] for state in states] if rule.num_states > 0 else [],
            [state[2] for state in states] if rule.num_states > 1 else [],
            [state[0] for state in states],
        )
        named = {store.name: tensor for store, tensor in zip(stores, tensors, strict=True)}
        output = program((named,), moved.bags, fused)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
        output.backward(gradient.to(device))
        leaves = {s.name: e.clone().requires_grad_() for s, e in zip(stores, expected, strict=True)}
        lookup(plan, leaves, case.bags, GradientOptions(sparse=True)).backward(gradient)
        for store, tensor, state in zip(stores, expected, expected_states, strict=True):
            rule.update(tensor, leaves[store.name].grad, state, step)
        for actual, wanted in zip(tensors, expected, strict=True):
            torch.testing.assert_close(actual.cpu(), wanted, rtol=2e-5, atol=2e-5)
        assert [int(state[0]) for state in states] == [step] * probes


def test_one_tensor_under_two_names_is_updated_twice(device: str) -> None:
    stores = (Store("a", 10, 4), Store("b", 10, 4))
    plan = LookupPlan(
        100, 4, stores, (Probe("a", Digit(1, 10)), Probe("b", Digit(1, 10))), pool="sum"
    )
    case = to_device(make_case(plan, [4, 4]), device)
    table = case.stores["a"].clone()
    rule = UpdateRule("sgd", 0.5, 0.0, 0.0, (0.9, 0.99))
    before = table.clone()
    steps = [torch.zeros(1, dtype=torch.int64) for _ in stores]
    fused = FusedStores(rule, [0, 1], [], [], steps)
    output = Program([plan])(({"a": table, "b": table},), case.bags, fused)
    output.backward(torch.ones_like(output))
    counts = torch.bincount(case.bags.ids % 10, minlength=10)[:, None]
    torch.testing.assert_close(table, before - 0.5 * 2 * counts.float())
