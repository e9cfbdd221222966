"""``torch.library.opcheck`` of every operator: schema, fake kernel, autograd, compilation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from embcompress.engine import ops
from embcompress.engine.encoding import encode_plans
from embcompress.engine.fused import OPTIMIZERS
from embcompress.plan import (
    Code,
    Digit,
    Hash,
    LookupPlan,
    Probe,
    Quantization,
    Sign,
    Store,
    Weight,
)

pytestmark = pytest.mark.skipif(
    not ops.is_available(),
    reason="the C++ extension is not built, or EMBCOMPRESS_ENGINE=reference is set",
)

POOLS, DTYPES, ID_DTYPES = ("none", "sum", "mean"), ("float32", "float16", "bfloat16"), (
    torch.int32, torch.int64,
)  # fmt: skip


@dataclass
class Case:
    """Arguments that the operators share.

    Attributes:
        floats: numbers of the float stores.
    """

    stores: list[Tensor]
    ids: Tensor
    offsets: Tensor | None
    weights: Tensor | None
    encoding: Tensor
    ends_are_given: bool
    num_features: int
    num_columns: int
    floats: list[int]

    @property
    def bags(self) -> tuple[Any, ...]:
        stores = [store.detach() for store in self.stores]
        weights = None if self.weights is None else self.weights.detach()
        return stores, self.ids, self.offsets, weights, self.encoding, self.ends_are_given

    @property
    def grad(self) -> Tensor:
        if self.offsets is None:
            return torch.randn(self.ids.numel(), self.num_columns)
        batch = (self.offsets.numel() - self.ends_are_given) // self.num_features
        return torch.randn(batch, self.num_columns)


def make_plan(kind: str, dtype: str, pool: str) -> LookupPlan:
    """A hashed table, a product of two with learned scales, or packed rows behind codes."""
    if kind == "hash":
        return LookupPlan(
            90, 8, (Store("rows", 9, 8, dtype),), (Probe("rows", Hash(1, 9), Sign(2)),), pool=pool
        )
    if kind == "product":
        return LookupPlan(
            90, 6,
            stores=(
                Store("a", 9, 6, dtype), Store("b", 10, 6, dtype), Store("scales", 5, 2, dtype),
            ),
            probes=(
                Probe("a", Digit(10, 9), Weight("scales", Hash(3, 5), 1)),
                Probe("b", Digit(1, 10)),
            ),
            combine="mul", pool=pool, padding_idx=3,
        )  # fmt: skip
    return LookupPlan(
        90, 5,
        stores=(
            Store("rows", 7, 5, "uint4", Quantization("steps", "lows")),
            Store("steps", 7, 1, dtype), Store("lows", 7, 1, dtype), Store("codes", 90, 1, "uint3"),
        ),
        probes=(Probe("rows", Code("codes", 7, Digit(1, 90), otherwise=Hash(4, 7))),),
        pool=pool,
    )  # fmt: skip


KINDS = ("hash", "product", "packed")


def make_case(
    kinds: tuple[str, ...],
    dtype: str,
    pool: str,
    id_dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    ends_are_given: bool = True,
) -> Case:
    torch.manual_seed(0)
    plans = [make_plan(kind, dtype, pool) for kind in kinds]
    stores: list[Tensor] = []
    numbers = []
    for plan in plans:
        numbers.append({s.name: len(stores) + k for k, s in enumerate(plan.stores)})
        for store in plan.stores:
            if store.is_float:
                values = torch.randn(store.rows, store.width).to(getattr(torch, dtype))
                stores.append(values.requires_grad_())
            else:
                stores.append(torch.randint(0, 256, (store.bytes,)).byte())
    encoded = encode_plans(plans, numbers)
    lengths = torch.tensor([0, 3, 1, 5] * len(kinds))
    ids = torch.randint(0, 90, (int(lengths.sum()),), dtype=id_dtype)
    offsets = None
    if pool != "none":
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(id_dtype)
        offsets = offsets if ends_are_given else offsets[:-1].clone()
    weights = None
    if weight_dtype is not None:
        weights = torch.rand(len(ids)).to(weight_dtype).requires_grad_()
    floats = [n for n, store in enumerate(stores) if store.is_floating_point()]
    return Case(
        stores, ids, offsets, weights, encoded.tensor, ends_are_given, len(kinds),
        encoded.num_columns, floats,
    )  # fmt: skip


def all_cases() -> list[Any]:
    """Every kind, dtype and pool, and several features.

    Those that are not slow hold every pair of a kind with a dtype, a pool or an id dtype.
    """
    cases = []
    for kind, dtype, pool in itertools.product(KINDS, DTYPES, POOLS):
        number = len(cases)
        quick = (KINDS.index(kind) + DTYPES.index(dtype) + POOLS.index(pool)) % 3 == 0
        weights = [None, torch.float32, torch.float16][number // 2 % 3] if pool == "sum" else None
        arguments = ((kind,), dtype, pool, ID_DTYPES[number % 2], weights, number % 4 < 2)
        name = "-".join([kind, dtype, pool, *([] if weights is None else ["weighted"])])
        marks = () if quick else (pytest.mark.slow,)
        cases.append(pytest.param(arguments, id=name, marks=marks))
    for pool, id_dtype, weights in (
        ("sum", torch.int64, None),
        ("sum", torch.int32, torch.float32),
        ("mean", torch.int64, None),
    ):
        name = f"features-{pool}{'' if weights is None else '-weighted'}"
        cases.append(pytest.param((KINDS, "float32", pool, id_dtype, weights, True), id=name))
    return cases


CASES = all_cases()
OPS = torch.ops.embcompress


@pytest.mark.parametrize("arguments", CASES)
def test_lookup(arguments: tuple[Any, ...]) -> None:
    case = make_case(*arguments)
    stores, weights = case.stores, case.weights
    _, ids, offsets, _, *rest = case.bags
    shape = (case.num_features, case.num_columns, False)
    opcheck(OPS.lookup.default, (stores, ids, offsets, weights, *rest, *shape))
    opcheck(OPS.lookup_forward.default, (*case.bags, *shape))


@pytest.mark.parametrize("arguments", CASES)
def test_lookup_backward(arguments: tuple[Any, ...]) -> None:
    case = make_case(*arguments)
    opcheck(OPS.lookup_backward.default, (case.grad, *case.bags, case.floats))


def test_lookup_backward_of_some_stores() -> None:
    case = make_case(("product",), "float32", "sum", torch.int64)
    for wanted in ([2, 0], []):
        opcheck(OPS.lookup_backward.default, (case.grad, *case.bags, wanted))
        opcheck(OPS.lookup_backward_sparse.default, (case.grad, *case.bags, wanted))


@pytest.mark.parametrize("arguments", CASES)
def test_lookup_backward_sparse(arguments: tuple[Any, ...]) -> None:
    case = make_case(*arguments)
    opcheck(OPS.lookup_backward_sparse.default, (case.grad, *case.bags, case.floats))


@pytest.mark.parametrize("arguments", CASES)
def test_lookup_backward_weights(arguments: tuple[Any, ...]) -> None:
    case = make_case(*arguments)
    opcheck(OPS.lookup_backward_weights.default, (case.grad, *case.bags))


def update_arguments(case: Case, name: str) -> tuple[Any, ...]:
    """Which stores, their state, and the optimizer."""
    shapes = [case.stores[number].shape for number in case.floats]
    if name == "rowwise_adagrad":
        shapes = [torch.Size([rows, 1]) for rows, _ in shapes]
    first = [torch.rand(shape) for shape in shapes] if name != "sgd" else []
    second = [torch.rand(shape) for shape in shapes] if name == "adam" else []
    steps = [torch.ones(1, dtype=torch.int64) for _ in shapes]
    settings = torch.tensor([0.1, 1e-8, 0.01, 0.9, 0.99], dtype=torch.float64)
    return case.floats, first, second, steps, settings, OPTIMIZERS[name]


def update_cases() -> list[Any]:
    """Every float32 case with every optimizer; those that are not slow hold each of them."""
    cases = []
    for case in CASES:
        for number, name in enumerate(sorted(OPTIMIZERS)):
            quick = case.id == "features-sum-weighted" or (len(cases) // 4 % 4 == number)
            marks = (*case.marks, *(() if quick else (pytest.mark.slow,)))
            if case.values[0][1] == "float32":
                identifier = f"{case.id}-{name}"
                cases.append(pytest.param(case.values[0], name, id=identifier, marks=marks))
    return cases


@pytest.mark.parametrize(("arguments", "name"), update_cases())
def test_lookup_backward_update(arguments: tuple[Any, ...], name: str) -> None:
    case = make_case(*arguments)
    update = update_arguments(case, name)
    opcheck(OPS.lookup_backward_update.default, (case.grad, *case.bags, *update))


@pytest.mark.parametrize(("arguments", "name"), update_cases())
def test_lookup_fused(arguments: tuple[Any, ...], name: str) -> None:
    """Its backward pass changes its inputs, so only values and gradients of weights compare."""
    case = make_case(*arguments)
    bags = [*case.bags]
    bags[3] = case.weights
    shape = (case.num_features, case.num_columns)
    anchor = torch.zeros((), requires_grad=True)
    arguments = (anchor, *bags, *shape, *update_arguments(case, name))
    opcheck(OPS.lookup_fused.default, arguments)
