"""Gradients of every method, in every phase and deployed; generated over the registry.

What is differentiable is compared with difference quotients (gradcheck). Numbers that are read
rounded have no quotient that says anything: of them the gradient is compared with its formula, from
gradients of the same plan with the rounded values as plain floats, which gradcheck has passed.
What procedures learn by gradients of their own is compared in tests of its own; :data:`PROCEDURES`
names them, and a method with another procedure fails here until it is in the list.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.budget import BudgetError
from embcompress.methods import resolve_method
from embcompress.plan import LookupPlan

ROWS, WIDTH, COUNT = 24, 4, 14
METHODS = sorted(ec.methods())
PHASES = [(name, phase.name) for name in METHODS for phase in resolve_method(name).phases()]

#: Methods whose rows are read rounded while they train, and what hands gradients through it.
ROUNDED = {
    "alpt": "straight through to the rows; steps stand still, and learn in ScaleLearning",
    "auto": "straight through to rows and steps, where low_bit is the best",
    "int16": "straight through to the rows; steps of so many codes stand still",
    "int4": "straight through to rows, steps and biases (LSQ+)",
    "int8": "straight through to rows, steps and biases (LSQ+)",
    "low_bit": "straight through to rows and steps (LSQ)",
    "mpe": "straight through to rows, and to steps of fewer than 8 bits (LSQ)",
    "residual_binary": "straight through to rows and steps (LSQ)",
}

#: Procedures that learn by gradients of vectors, and the tests of what they make of these.
PROCEDURES = {
    "CodeLearning": (
        "test_code_learning.test_an_id_takes_the_codewords_nearest_to_where_its_gradient_leads"
    ),
    "GateSearch": "test_sparse_methods.test_autosrh_gates_learn_by_the_chain_rule",
    "QueryLearning": "test_query_learning.test_soft_gradients_are_those_of_autograd",
    "RowThresholds": "test_optembed.test_thresholds_take_the_steps_of_the_loss_and_its_pressure",
    "ScaleLearning": "test_alpt.test_a_step_is_the_papers",
    "SensitivitySearch": "test_mpe.test_sensitivities_are_sums_over_what_is_looked_up",
    "WidthSearch": "test_autodim.test_logits_take_the_steps_of_adam_along_the_gradient",
}


def bag(method: str, mode: str = "sum") -> ec.EmbeddingBag:
    """A small table in float64, under a budget that makes a method do what it is for."""
    torch.manual_seed(0)
    make = partial(
        ec.EmbeddingBag, ROWS, WIDTH, mode=mode, padding_idx=2, method=method, dtype=torch.float64
    )
    try:
        return make(budget="60%")
    except BudgetError as error:  # a network, or slots, of so few rows
        return make(budget=error.smallest)


def in_phase(method: str, phase: str) -> ec.EmbeddingBag:
    module = bag(method)
    procedure = ec.TrainingProcedure(module)
    while (begun := procedure.begin_phase(lambda: 0.0)) is not None:
        if begun.name == phase:
            procedure.close()
            return module
    raise AssertionError(f"{method} has no phase {phase}")


def some_bags() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, ROWS, (COUNT,), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([0, 0, 3, 4, 11])


def sample_weights() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(COUNT, generator=generator, dtype=torch.float64).requires_grad_()


def in_memory(plan: LookupPlan) -> LookupPlan:
    """Without files, whose rows take no dense gradients."""
    return replace(plan, stores=tuple(replace(s, location="memory") for s in plan.stores))


def with_plain_rows(plan: LookupPlan) -> LookupPlan:
    """The plan with rows of floats where there are quantized ones, whose steps nothing reads."""
    steps = {name for s in plan.stores for name in steps_of(plan, s.name)}
    plain = (
        s if s.quantization is None else replace(s, dtype="float64", quantization=None)
        for s in plan.stores
    )
    return replace(plan, stores=tuple(s for s in plain if s.name not in steps))


def steps_of(plan: LookupPlan, name: str) -> tuple[str, ...]:
    """Names of the step and the bias of a store."""
    quantization = plan.store(name).quantization
    if quantization is None:
        return ()
    both = (quantization.scale, quantization.bias)
    return tuple(each for each in both if each is not None)


def check(plan: LookupPlan, stores: dict[str, Tensor], mode: str) -> None:
    """Gradcheck by all floats of the stores and, where bags are sums, the weights of samples."""
    module = ec.EmbeddingBag.from_plan(plan)
    ids, offsets = some_bags()
    generator = torch.Generator().manual_seed(3)
    # Multipliers start alike and thresholds far away: maxima would tie, and gradients be nothing.
    names = [name for name, values in stores.items() if values.is_floating_point()]
    thresholds = {store.threshold for store in plan.stores}
    moved = {
        name: torch.randn(stores[name].shape, generator=generator, dtype=torch.float64) * 0.1
        + (-3.0 if name in thresholds else stores[name].detach())
        for name in names
    }
    inputs = [moved[name].requires_grad_() for name in names]
    weights = [sample_weights()] if mode == "sum" else []
    others = {name: values for name, values in stores.items() if name not in moved}

    def function(*tensors: Tensor) -> Tensor:
        values = {**others, **dict(zip(names, tensors, strict=False))}
        arguments = (ids, offsets, tensors[-1] if weights else None)
        return torch.func.functional_call(module, values, arguments)

    assert len(names) > 0 and torch.autograd.gradcheck(function, (*inputs, *weights))
    output = function(*inputs, *weights)
    found = torch.autograd.grad(output.square().sum(), inputs, allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in found)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_deployed(method: str, mode: str) -> None:
    module = ec.deploy(bag(method, mode))
    check(in_memory(module.plan), module.stores(), mode)


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_what_is_trained(method: str, phase: str) -> None:
    module = in_phase(method, phase)
    plan = with_plain_rows(in_memory(module.plan))
    stores = module.stores()
    check(plan, {store.name: stores[store.name] for store in plan.stores}, "sum")


def rounded(module: ec.EmbeddingBag) -> list[str]:
    return [store.name for store in module.plan.stores if store.quantization is not None]


def test_rounded_rows_are_declared() -> None:
    found = {method for method, phase in PHASES if rounded(in_phase(method, phase))}
    assert found == set(ROUNDED)


@pytest.mark.parametrize(("method", "phase"), [each for each in PHASES if each[0] in ROUNDED])
def test_what_is_rounded(method: str, phase: str) -> None:
    """Esser 2020, equations 3 and 5, and LSQ+ for the bias; half a step more on either side."""
    module = in_phase(method, phase)
    plan = in_memory(module.plan)
    stores = {name: values.detach().clone() for name, values in module.stores().items()}
    generator = torch.Generator().manual_seed(4)
    for name in rounded(module):  # so that some of the latents are beyond their codes
        noise = torch.randn(stores[name].shape, generator=generator, dtype=torch.float64)
        stores[name] = stores[name] * (1 + 3 * noise.abs())
    plain = {**stores, **{name: rounding(plan, stores, name)[0] for name in rounded(module)}}
    trained, values = gradients(plan, stores), gradients(with_plain_rows(plan), plain)
    for name in rounded(module):
        _, inside, of_step, of_bias = rounding(plan, stores, name)
        torch.testing.assert_close(trained[name], values[name] * inside)
        quantization, store = plan.store(name).quantization, plan.store(name)
        assert quantization is not None
        if not quantization.trained:
            continue
        for part, slope in zip(steps_of(plan, name), (of_step, of_bias), strict=False):
            shape = stores[part].shape
            shared = stores[name].numel() / stores[part].numel()
            expected = (values[name] * slope).sum_to_size(shape) / (
                shared * (2**store.bits - 1)
            ) ** 0.5
            torch.testing.assert_close(trained[part], expected)


def rounding(
    plan: LookupPlan, stores: dict[str, Tensor], name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values of latents, which of them are inside of the codes, and slopes by step and bias."""
    store, parts = plan.store(name), [stores[each] for each in steps_of(plan, name)]
    last, step = 2**store.bits - 1, parts[0]
    middle = 0.0 if len(parts) == 2 else last / 2
    bias = parts[1] if len(parts) == 2 else -step * middle
    position = (stores[name] - bias) / step
    code = position.round().clamp(0, last)
    inside = (position - code).abs() <= 0.5
    of_step = torch.where(inside, code - position, code - middle)
    return step * code + bias, inside, of_step, (~inside).double()


def gradients(plan: LookupPlan, stores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a fixed function of the bags."""
    module = ec.EmbeddingBag.from_plan(plan)
    leaves = {store.name: stores[store.name].clone() for store in plan.stores}
    for leaf in leaves.values():
        leaf.requires_grad_(leaf.is_floating_point())
    ids, offsets = some_bags()
    output = torch.func.functional_call(module, leaves, (ids, offsets, sample_weights().detach()))
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def test_gradients_that_procedures_learn_by_are_tested() -> None:
    found = set()
    for name in METHODS:
        method = resolve_method(name)
        phased = [method.phase_procedure(phase) for phase in method.phases()]
        found |= {each for each in (method.procedure(), *phased) if each is not None}
    names = {type(each).__name__ for each in found if each.observes == "gradients of vectors"}
    assert names == set(PROCEDURES)
    for path in PROCEDURES.values():
        module, test = path.split(".")
        assert callable(getattr(importlib.import_module(f"tests.{module}"), test))
