"""How far a result may be from the exact one: a bound from rounding errors, not a guess.

The exact result is the reference in float64. Every float32 result is a sum of products of N
terms; whatever the order of summation its error is at most ``(N + factors) * eps`` times the same
sum over absolute values. Where all numbers are whole and that sum stays below 2**23, every order
gives the exact result, and the comparison is bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embcompress.engine.reference import lookup_reference, output_dtype
from embcompress.plan import FLOAT_BITS, LookupPlan, Sign
from tests.engine.devices import to_device
from tests.plan_cases import Case, pack_bits, unpack_bits, with_leaves

Lookup = Callable[[Case], Tensor]

#: Whole numbers (and halves, from symmetric codes) below this are exact in float32.
EXACT_END = 2.0**23
WEIGHTS = "per_sample_weights"


@dataclass(frozen=True)
class Result:
    """Values, and gradients by store name (None: nothing flows there)."""

    output: Tensor
    gradients: dict[str, Tensor | None]


def reference(case: Case, sparse: bool = False) -> Tensor:
    return lookup_reference(case.plan, case.stores, case.bags, sparse=sparse)


def run(
    case: Case,
    gradient: Tensor,
    lookup: Lookup = reference,
    *,
    frozen: Collection[str] = (),
    device: str = "cpu",
) -> Result:
    """Forward and backward with a gradient of the output (cast to its dtype).

    Args:
        frozen: names of stores that take no gradient.
        device: where the leaves are; results are on the CPU.
    """
    leaves = with_leaves(to_device(case, device), frozen)
    output = lookup(leaves)
    inputs = {name: t for name, t in leaves.stores.items() if t.requires_grad}
    if leaves.bags.weights is not None:
        inputs[WEIGHTS] = leaves.bags.weights
    if output.requires_grad:
        output.backward(gradient.to(output))
    gradients = {name: None if t.grad is None else t.grad.cpu() for name, t in inputs.items()}
    return Result(output.detach().cpu(), gradients)


def quantization_steps(case: Case) -> set[str]:
    """Names of the stores that scale and shift packed ones."""
    quantizations = [s.quantization for s in case.plan.stores if s.quantization is not None]
    return {name for q in quantizations for name in (q.scale, q.bias) if name is not None}


def output_gradient(case: Case) -> Tensor:
    """A float64 gradient for the case's output, exact in its dtype."""
    generator = torch.Generator().manual_seed(case.number)
    rows = case.bags.ids.numel() if case.plan.pool == "none" else case.bags.offsets.numel() - 1
    shape = (rows, case.plan.embedding_dim)
    if case.whole:
        return torch.randint(-2, 3, shape, generator=generator).double()
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(output_dtype(case.plan, case.stores)).double()


def in_float64(case: Case) -> Case:
    """The same numbers in float64."""
    plan = case.plan.with_dtypes({s.name: "float64" for s in case.plan.stores if s.is_float})
    stores = {n: t.double() if t.is_floating_point() else t for n, t in case.stores.items()}
    weights = None if case.bags.weights is None else case.bags.weights.double()
    return replace(case, plan=plan, stores=stores, bags=replace(case.bags, weights=weights))


def absolute(case: Case) -> Case:
    """The case whose result is the sum of the absolute values of all terms, in float64.

    A maximum becomes a sum, which is no smaller.
    """
    case = in_float64(case)
    probes = tuple(
        replace(p, scale=None) if isinstance(p.scale, Sign) else p for p in case.plan.probes
    )
    pool = "sum" if case.plan.pool == "max" else case.plan.pool
    stores = {n: t.abs() if t.is_floating_point() else t for n, t in case.stores.items()}
    for store in case.plan.stores:
        if store.quantization is not None and store.quantization.bias is None:
            stores[store.name] = _codes_above_the_middle(stores[store.name], store.bits)
    weights = None if case.bags.weights is None else case.bags.weights.abs()
    plan = replace(case.plan, probes=probes, pool=pool)
    return replace(case, plan=plan, stores=stores, bags=replace(case.bags, weights=weights))


def _codes_above_the_middle(packed: Tensor, bits: int) -> Tensor:
    """Codes mirrored so that ``code - (2**bits - 1) / 2`` is its absolute value."""
    last = (1 << bits) - 1
    return pack_bits([max(code, last - code) for code in unpack_bits(packed, bits)], bits)


def accumulation_eps(plan: LookupPlan) -> float:
    """Unit of rounding: of float64 where every float is, of float32 elsewhere."""
    bits = {FLOAT_BITS[store.dtype] for store in plan.stores if store.is_float}
    return torch.finfo(torch.float64 if bits == {64} else torch.float32).eps


class Judge:
    """What a case must give, for values and for gradients, with the error that rounding explains.

    Attributes:
        gradient: gradient of the output that :meth:`check` expects to have been used.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.gradient = output_gradient(case)
        # In other precision a maximum of almost equal numbers may be another id's.
        rounded = case.plan.pool == "max" and not case.whole
        self.expected = run(case if rounded else in_float64(case), self.gradient)
        self.magnitude = run(absolute(case), self.gradient.abs())
        self.exact = case.whole and case.plan.pool != "mean"
        terms = case.bags.ids.numel() + case.plan.width + case.plan.embedding_dim
        factors = 4 * len(case.plan.probes) + 8
        self.tolerance = (terms + factors) * accumulation_eps(case.plan)

    def check_output(self, output: Tensor) -> None:
        """Assert that values are right."""
        assert output.dtype == output_dtype(self.case.plan, self.case.stores), self.case
        self._compare(output, self.expected.output, self.magnitude.output, "output")

    def check(self, actual: Result) -> None:
        """Assert that values and all gradients of ``actual`` are right."""
        self.check_output(actual.output)
        for name, ours in actual.gradients.items():
            theirs, size = self.expected.gradients[name], self.magnitude.gradients[name]
            if ours is None or theirs is None or size is None:
                nothing = all(g is None or not g.to_dense().any() for g in (ours, theirs))
                assert nothing, f"gradient of {name} of {self.case}"
                continue
            what = f"gradient of {name}"
            self._compare(ours.to_dense(), theirs.to_dense(), size.to_dense(), what)

    def _compare(self, actual: Tensor, expected: Tensor, magnitude: Tensor, what: str) -> None:
        what = f"{what} of {self.case}"
        assert_within(actual, expected, magnitude, self.exact, self.tolerance, what)


def check(case: Case, lookup: Lookup) -> None:
    """Assert that values and gradients of ``lookup`` are those of the reference."""
    judge = Judge(case)
    judge.check(run(case, judge.gradient, lookup))


def assert_within(
    actual: Tensor, expected: Tensor, magnitude: Tensor, exact: bool, tolerance: float, what: str
) -> None:
    """Assert ``|actual - expected| <= tolerance * magnitude`` and half a step of the dtype."""
    rounded = expected.to(actual.dtype)
    assert actual.shape == rounded.shape, f"shape of {what}"
    if exact and (magnitude < EXACT_END).all():
        assert torch.equal(actual, rounded), _difference(actual, rounded, what)
        return
    info = torch.finfo(actual.dtype)
    bound = tolerance * magnitude + info.eps * (expected.abs().double() + info.tiny)
    error = (actual.double() - expected.double()).abs()
    within = (error <= bound) | (actual == rounded)  # equal infinities have no difference
    assert within.all(), _difference(actual, rounded, what, within)


def _difference(actual: Tensor, expected: Tensor, what: str, within: Tensor | None = None) -> str:
    wrong = (actual != expected) if within is None else ~within
    where = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} numbers differ, first at {where}: "
        f"{actual[where].item()!r}, not {expected[where].item()!r}"
    )
