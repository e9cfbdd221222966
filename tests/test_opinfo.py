"""``full`` equals torch over every sample that PyTorch's own OpInfo generates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import embcompress as ec

DTYPES = [torch.float32, torch.float64]


def samples(name: str, dtype: torch.dtype) -> Iterator[Any]:
    (info,) = (info for info in op_db if info.name == name)
    generated = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(generated) >= 3
    yield from generated


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.layout == expected.layout
    assert torch.equal(actual.to_dense(), expected.to_dense())


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    for sample in samples("nn.functional.embedding", dtype):
        arguments = dict(sample.kwargs)
        arguments.pop("requires_grad", None)
        # The OpInfo of embedding passes (weight, ids), and its wrapper turns them around.
        weight, ids = leaf(sample.input), sample.args[0]
        module = ec.Embedding(*weight.shape, _weight=leaf(sample.input), **arguments)
        expected, actual = F.embedding(ids, weight, **arguments), module(ids)
        assert torch.equal(actual, expected)
        gradient = torch.randn_like(expected)
        expected.backward(gradient)
        actual.backward(gradient)
        assert_equal(module.weight.grad, weight.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_bag(dtype: torch.dtype) -> None:
    for sample in samples("nn.functional.embedding_bag", dtype):
        arguments = dict(sample.kwargs)
        weight, (ids, *rest) = leaf(sample.input), sample.args
        offsets = rest[0] if rest else arguments.pop("offsets", None)
        weights = arguments.pop("per_sample_weights", None)
        ours_weights = None if weights is None else leaf(weights)
        theirs_weights = None if weights is None else leaf(weights)
        module = ec.EmbeddingBag(*weight.shape, _weight=leaf(sample.input), **arguments)
        expected = F.embedding_bag(
            ids, weight, offsets, per_sample_weights=theirs_weights, **arguments
        )
        actual = module(ids, offsets, ours_weights)
        assert torch.equal(actual, expected)
        gradient = torch.randn_like(expected)
        expected.backward(gradient)
        actual.backward(gradient)
        assert_equal(module.weight.grad, weight.grad)
        if weights is not None:
            assert torch.equal(ours_weights.grad, theirs_weights.grad)
