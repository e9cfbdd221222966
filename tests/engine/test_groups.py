"""Collections that one call cannot run: which features share a call, and that none is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.engine.bags import Bags
from embcompress.engine.dense import GradientOptions
from embcompress.engine.groups import FeatureBags, group_features
from embcompress.optimizers import unfuse_optimizer

DENSE, SPARSE = GradientOptions(), GradientOptions(sparse=True)
FEATURES = {"x": 100, "first": 60, "y": 100, "second": 60}


def mixed(method: str) -> ec.EmbeddingBagCollection:
    """Two tables of two features each, which take turns; one has maxima."""
    torch.manual_seed(0)
    tables = [
        ec.TableConfig("sums", 100, 8, ("x", "y")),
        ec.TableConfig("maxima", 60, 4, ("first", "second"), mode="max"),
    ]
    tables_of = {"x": "sums", "first": "maxima", "y": "sums", "second": "maxima"}
    made = ec.EmbeddingBagCollection(tables, method=method)
    return ec.EmbeddingBagCollection.from_tables(dict(made.embedding_bags.items()), tables_of)


def batch(length: int, size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {
        name: torch.randint(0, rows, (size, length), generator=generator)
        for name, rows in FEATURES.items()
    }


def feature_major(ids: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    flat = torch.cat([bags.flatten() for bags in ids.values()])
    length = next(iter(ids.values())).shape[1]
    return flat, torch.arange(0, len(flat) + 1, length)


@pytest.mark.parametrize("method", ["full", "qr", "dhe", "tt"])
def test_every_feature_has_its_columns(method: str) -> None:
    collection, ids = mixed(method), batch(3)
    tables = collection.tables_of_features()
    expected = torch.cat([tables[name](ids[name]) for name in ids], dim=1)
    torch.testing.assert_close(collection(ids), expected)
    empty = batch(3, size=0)
    assert collection(empty).shape == (0, 24)


@pytest.mark.parametrize("method", ["full", "qr", "dhe"])
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_a_table_of_several_features_is_updated_once(name: str, method: str) -> None:
    """By the sum of their gradients, as torch does, also where it has maxima."""
    fused, plain, ids = mixed(method), mixed(method), batch(3)
    ec.fuse_optimizer(fused, name, lr=0.05)
    make = torch.optim.SGD if name == "sgd" else torch.optim.Adagrad
    optimizer = make(plain.parameters(), lr=0.05)
    for _ in range(2):
        fused(ids).mean().backward()
        optimizer.zero_grad()
        plain(ids).mean().backward()
        optimizer.step()
    for store, expected in plain.named_parameters():
        torch.testing.assert_close(fused.get_parameter(store), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["qr", "low_bit", "dhe", "tt"])
def test_an_exported_collection_takes_other_batches(method: str) -> None:
    collection = mixed(method).eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC}, None)
    program = torch.export.export(collection, feature_major(batch(3)), dynamic_shapes=dynamic)
    for length in (3, 5):
        inputs = feature_major(batch(length))
        torch.testing.assert_close(program.module()(*inputs), collection(*inputs))


def test_groups() -> None:
    plans = [bag.plan for bag in mixed("qr").tables_of_features().values()]
    owners = (0, 1, 0, 1)
    found = group_features(plans, owners, [DENSE] * 4)
    assert [(g.features, g.is_one_table) for g in found] == [((0, 2), False), ((1, 3), True)]
    found = group_features(plans, owners, [DENSE, DENSE, SPARSE, DENSE])
    assert [g.features for g in found] == [(0,), (1, 3), (2,)]


def test_the_bags_of_some_features() -> None:
    """Of three features with two bags each."""
    ids, offsets = torch.arange(10), torch.tensor([0, 1, 3, 3, 6, 8, 10])
    split = FeatureBags(Bags(ids, offsets, ids.float()), 3)
    part = split.of((0, 2))
    assert part.ids.tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert part.offsets.tolist() == [0, 1, 3, 5, 7]
    assert part.weights is not None and part.weights.tolist() == part.ids.tolist()
    assert split.of((1,)).offsets.tolist() == [0, 0, 3]
    with pytest.raises(ValueError, match="not 4 features"):
        FeatureBags(Bags(ids, offsets), 4)


def test_maxima_with_sparse_gradients() -> None:
    """Which torch refuses, and its optimizers take."""
    table = ec.EmbeddingBag(60, 4, method="full", mode="max", sparse=True)
    table(torch.tensor([[1, 2], [2, 9]])).sum().backward()
    gradient = table.get_parameter("weight").grad
    assert gradient is not None and gradient.is_sparse
    assert set(gradient.coalesce().indices()[0].tolist()) <= {1, 2, 9}
    assert gradient.to_dense().sum() == 8


def test_gradients_are_dense_again_without_the_fused_optimizer() -> None:
    table = ec.EmbeddingBag(60, 4, method="full", mode="sum").half()
    ec.fuse_optimizer(table, "sgd", lr=0.1)
    unfuse_optimizer(table)
    table(torch.tensor([[1, 2]])).float().sum().backward()
    gradient = table.get_parameter("weight").grad
    assert gradient is not None and not gradient.is_sparse
