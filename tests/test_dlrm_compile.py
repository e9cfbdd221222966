"""The reference model under torch.compile."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.engine import ops
from embcompress.models import DLRM


@pytest.mark.parametrize(("method", "num_dense"), [("full", 3), ("qr", 0), ("low_dim", 3)])
def test_compiled_it_gives_the_same_values_and_gradients(method: str, num_dense: int) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    tables = [ec.TableConfig(name, 100, 8) for name in ("a", "b", "c")]
    budget = "100%" if method == "full" else "50%"
    dlrm = DLRM(ec.EmbeddingBagCollection(tables, method=method, budget=budget), num_dense)
    # Without the compiled operators the features' sizes are read off the offsets: a graph break.
    compiled = torch.compile(dlrm, backend="aot_eager", fullgraph=ops.is_available())
    for batch in (2, 5):
        ids = torch.randint(100, (4 * 3 * batch,))
        offsets = torch.arange(3 * batch + 1) * 4
        dense = torch.randn(batch, num_dense)
        expected = dlrm(dense, ids, offsets)
        gradients = torch.autograd.grad(expected.sum(), list(dlrm.parameters()))
        found = compiled(dense, ids, offsets)
        torch.testing.assert_close(found, expected)
        for mine, theirs in zip(
            torch.autograd.grad(found.sum(), list(dlrm.parameters())), gradients, strict=True
        ):
            torch.testing.assert_close(mine, theirs)
