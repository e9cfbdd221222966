"""Float latents of packed rows: their rounding, its gradients, and the compiled engine's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from embcompress.engine import Bags, GradientOptions, lookup, ops
from embcompress.engine.quantization import fake_quantize
from embcompress.engine.reference import lookup_reference
from embcompress.plan import (
    PACKED_VALUE_BITS,
    Combine,
    Digit,
    Hash,
    LookupPlan,
    Pool,
    Probe,
    Quantization,
    Sign,
    Store,
)

ROWS, WIDTH, IDS = 50, 6, 200
SHAPES = ((1, 1), (1, WIDTH), (ROWS, 1), (ROWS, WIDTH))


@pytest.mark.parametrize("bits", PACKED_VALUE_BITS)
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_the_paper(bits: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    last, damping = 2**bits - 1, 0.3
    v = torch.randn(400, 3, generator=generator, dtype=torch.float64) * last
    s = torch.tensor([[0.4, 1.0, 2.5]], dtype=torch.float64)
    b = torch.tensor([[-0.2, 0.0, 1.0]], dtype=torch.float64) if biased else -s * last / 2
    gradient = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    x = (v - b) / s
    code = x.round().clamp(0, last)
    inside = (x - code).abs() <= 0.5
    assert inside.any() and not inside.all()

    values, step = v.clone().requires_grad_(), s.clone().requires_grad_()
    bias = b.clone().requires_grad_() if biased else None
    output = fake_quantize(values, step, bias, bits, damping)
    output.backward(gradient)
    torch.testing.assert_close(output, s * code + b)
    # Esser 2020, equations 3 and 5, with half a step more on either side.
    middle = 0.0 if biased else last / 2
    of_step = torch.where(inside, code - x, code - middle)
    torch.testing.assert_close(values.grad, gradient * inside)
    torch.testing.assert_close(step.grad, damping * (gradient * of_step).sum(0, keepdim=True))
    if bias is not None:
        expected = damping * (gradient * ~inside).sum(0, keepdim=True)
        torch.testing.assert_close(bias.grad, expected)


def test_a_step_of_zero_gives_the_bias() -> None:
    v = torch.tensor([[-1.0, 0.0, 3.0]], requires_grad=True)
    s, b = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1)
    output = fake_quantize(v, s, b, 4, 1.0)
    assert torch.equal(output, torch.zeros(1, 3))
    output.sum().backward()
    assert s.grad is not None and s.grad.isfinite().all() and v.grad.isfinite().all()


def latent_plan(
    bits: int, biased: bool, shape: tuple[int, int], dtype: str, combine: Combine, pool: Pool
) -> LookupPlan:
    stores = [
        Store("steps", *shape, dtype),
        Store(
            "rows", ROWS, WIDTH, f"uint{bits}", Quantization("steps", "bias" if biased else None)
        ),
    ]
    if biased:
        stores.append(Store("bias", *shape, dtype))
    probes = (Probe("rows", Hash(3, ROWS), Sign(7)), Probe("rows", Digit(4, ROWS - 1), offset=1))
    width = 2 * WIDTH if combine == "concat" else WIDTH
    return LookupPlan(IDS, width, tuple(stores), probes, combine, pool=pool, padding_idx=5)


def latent_stores(plan: LookupPlan, generator: torch.Generator) -> dict[str, Tensor]:
    bits = plan.store("rows").bits
    stores = {"rows": torch.randn(ROWS, WIDTH, generator=generator)}
    for name in {"steps", "bias"} & {store.name for store in plan.stores}:
        own = plan.store(name)
        noise = torch.rand(own.rows, own.width, generator=generator)
        values = (noise + 0.5) * 3 / 2**bits if name == "steps" else noise - 2
        stores[name] = values.to(getattr(torch, own.dtype))
    return stores


def run(plan: LookupPlan, stores: dict[str, Tensor], bags: Bags, compiled: bool) -> list[Tensor]:
    """Output and the gradient of every store."""
    leaves = {name: t.clone().requires_grad_() for name, t in stores.items()}
    output = (lookup if compiled else lookup_reference)(plan, leaves, bags)
    output.backward(torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.skipif(not ops.is_available(), reason="the C++ extension is not built")
@pytest.mark.parametrize("bits", PACKED_VALUE_BITS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_compiled_engine_reads_and_trains_latents(bits: int, dtype: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    ids = torch.randint(0, IDS, (300,), generator=generator)
    bags = Bags(ids, torch.arange(0, 301, 3))
    # A number that is rounded to the dtype at the end may differ by its last bit.
    last_bit = torch.finfo(getattr(torch, dtype)).eps
    tolerance = {"rtol": max(2e-4, last_bit), "atol": 2e-4 if dtype == "float32" else 2e-2}
    for biased, shape, combine in itertools.product(
        (False, True), SHAPES, ("sum", "mul", "concat")
    ):
        plan = latent_plan(bits, biased, shape, dtype, combine, "sum")
        stores = latent_stores(plan, generator)
        expected = run(plan, stores, bags, compiled=False)
        actual = run(plan, stores, bags, compiled=True)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, **tolerance)
        sparse = {name: t.clone().requires_grad_() for name, t in stores.items()}
        lookup(plan, sparse, bags, GradientOptions(sparse=True)).sum().backward()
        dense = {name: t.clone().requires_grad_() for name, t in stores.items()}
        lookup(plan, dense, bags).sum().backward()
        for name in stores:
            torch.testing.assert_close(sparse[name].grad.to_dense(), dense[name].grad)


@pytest.mark.skipif(not ops.is_available(), reason="the C++ extension is not built")
def test_latents_of_another_shape_are_refused() -> None:
    plan = latent_plan(4, False, (1, 1), "float32", "sum", "sum")
    stores = latent_stores(plan, torch.Generator().manual_seed(0))
    bags = Bags(torch.arange(6), torch.tensor([0, 6]))
    for shape in ((ROWS - 1, WIDTH), (ROWS, WIDTH - 1), (ROWS, WIDTH + 1)):
        with pytest.raises(RuntimeError, match="encoding"):
            lookup(plan, {**stores, "rows": torch.zeros(shape)}, bags)


@pytest.mark.skipif(not ops.is_available(), reason="the C++ extension is not built")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_latents_that_are_no_numbers_read_alike_in_both_engines(value: float) -> None:
    plan = latent_plan(4, True, (1, WIDTH), "float32", "concat", "none")
    stores = latent_stores(plan, torch.Generator().manual_seed(0))
    stores["rows"][::2] = value
    bags = Bags(torch.arange(IDS), torch.arange(IDS))
    actual, expected = lookup(plan, stores, bags), lookup_reference(plan, stores, bags)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert actual.isnan().any() == (value != value)
