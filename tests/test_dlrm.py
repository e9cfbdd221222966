"""The reference model."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.models import DLRM


def model(num_dense: int = 3) -> DLRM:
    torch.manual_seed(0)
    tables = [ec.TableConfig(name, 100, 8) for name in ("a", "b", "c")]
    collection = ec.EmbeddingBagCollection(tables, method="hash", budget="50%")
    return DLRM(collection, num_dense, bottom_widths=(16,), top_widths=(16,))


IDS, OFFSETS = torch.tensor([1, 2, 3, 4, 5, 6, 7]), torch.tensor([0, 1, 3, 4, 5, 6, 7])


def test_it_is_the_papers_formula() -> None:
    dlrm, dense = model(), torch.randn(2, 3)
    bottom = dlrm.bottom(dense)
    pooled = dlrm.embeddings(IDS, OFFSETS).split(8, dim=1)
    vectors = [bottom, *pooled]
    dots = [(vectors[i] * vectors[j]).sum(1) for i in range(4) for j in range(i)]
    expected = dlrm.top(torch.cat([bottom, torch.stack(dots, 1)], 1)).squeeze(1)
    torch.testing.assert_close(dlrm(dense, IDS, OFFSETS), expected)


def test_without_numbers_there_is_no_bottom() -> None:
    dlrm = model(num_dense=0)
    assert dlrm.bottom is None
    assert dlrm(torch.empty(2, 0), IDS, OFFSETS).shape == (2,)


def test_every_parameter_is_trained() -> None:
    dlrm = model()
    dlrm(torch.randn(2, 3), IDS, OFFSETS).sum().backward()
    assert all(p.grad is not None for p in dlrm.parameters())


def test_features_of_different_widths_are_refused() -> None:
    tables = [ec.TableConfig("a", 100, 8), ec.TableConfig("b", 100, 4)]
    with pytest.raises(ValueError, match=r"one width, got \[4, 8\]"):
        DLRM(ec.EmbeddingBagCollection(tables), 0)
