"""What torch does with modules beside eager calls and compilers: ``torch.func`` and tracing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value

import embcompress as ec

METHODS = ("full", "hash", "qr", "multihash", "low_bit", "cce", "pq", "dhe", "memcom")


def make_table(method: str) -> ec.EmbeddingBag:
    budget = None if method == "full" else "30%"
    return ec.EmbeddingBag(3000, 16, method=method, budget=budget, mode="sum")


@pytest.mark.parametrize("method", METHODS)
def test_functional_gradients_are_autograd_s(method: str) -> None:
    table, ids, weights = make_table(method), torch.randint(0, 3000, (8, 3)), torch.rand(8, 3)

    def loss(parameters: dict[str, Tensor], weights: Tensor) -> Tensor:
        arguments = {"per_sample_weights": weights}
        return functional_call(table, parameters, (ids,), arguments).square().sum()

    parameters = dict(table.named_parameters())
    (found, of_weights), value = grad_and_value(loss, argnums=(0, 1))(parameters, weights)
    weights.requires_grad_()
    expected = table(ids, per_sample_weights=weights).square().sum()
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(of_weights, weights.grad)
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad)


def test_functional_gradients_of_a_collection() -> None:
    tables = [ec.TableConfig(name, 500, 8) for name in "ab"]
    collection = ec.EmbeddingBagCollection(tables, method="qr", budget="20%")
    ids = {"a": torch.randint(0, 500, (6, 2)), "b": torch.randint(0, 500, (6, 3))}
    parameters = dict(collection.named_parameters())
    found = grad(lambda p: functional_call(collection, p, (ids,)).square().sum())(parameters)
    collection(ids).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("method", METHODS)
def test_a_traced_module_takes_other_batches(method: str) -> None:
    table = make_table(method).eval()
    traced = torch.jit.trace(table, (torch.randint(0, 3000, (8, 3)),))
    for shape in ((8, 3), (2, 5), (1, 1)):
        ids = torch.randint(0, 3000, shape)
        assert torch.equal(traced(ids), table(ids))


@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("method", sorted(ec.methods()))
def test_autocast_changes_no_dtype(method: str, mode: str) -> None:
    """As of torch's own tables, which autocast leaves alone."""
    budget = "30%" if method in METHODS and method != "full" else None
    table = ec.EmbeddingBag(3000, 16, method=method, budget=budget, mode=mode)
    ids = torch.randint(0, 3000, (8, 3))
    expected = table(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = table(ids)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)
