"""Deep hash embeddings: a network over hashes of the id."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import embcompress as ec
from embcompress.hashing import MASK64, derive_key, hash_bucket, mix64
from embcompress.methods import TableSpec

ROWS, WIDTH = 1000, 12
IDS = torch.arange(ROWS)


def features_of(key: int, count: int, buckets: int, ids: list[int]) -> torch.Tensor:
    """The formula, number by number."""
    keys = [mix64((key + i) & MASK64) for i in range(count)]
    numbers = [[2 * hash_bucket(x, k, buckets) / (buckets - 1) - 1 for k in keys] for x in ids]
    return torch.tensor(numbers)


def network_of(module: ec.Embedding | ec.EmbeddingBag, features: torch.Tensor) -> torch.Tensor:
    """The network, layer by layer."""
    layers = len(module.plan.head.weights)
    vectors = features
    for layer in range(layers):
        weight, bias = getattr(module, f"weight_{layer}"), getattr(module, f"bias_{layer}")
        vectors = vectors @ weight.T + bias
        if layer < layers - 1:
            mean = vectors.mean(1, keepdim=True)
            variance = vectors.var(1, correction=0, keepdim=True)
            vectors = (vectors - mean) / (variance + 1e-5).sqrt()
            vectors = vectors * torch.tanh(F.softplus(vectors))
    return vectors


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_vectors_are_those_of_the_network(layers: int) -> None:
    method = ec.DeepHash(hashes=9, layers=layers, buckets=1000)
    module = ec.Embedding(ROWS, WIDTH, method=method, budget="30%", seed=5, name="item")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    features = features_of(derive_key(5, "item", 0), 9, 1000, IDS.tolist())
    torch.testing.assert_close(module(IDS), network_of(module, features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", [0, 1, 2**63 + 5, 2**64 - 1])
def test_features_are_exact_for_large_ids_and_keys(key: int) -> None:
    from embcompress.engine.hashing import hash_features
    from embcompress.plan import HashFeatures

    ids = [0, 1, 2**24 + 1, 2**31, 2**40 + 3, 2**63 - 1]
    found = hash_features(HashFeatures(key, 5, 2**24), torch.tensor(ids), torch.float64)
    torch.testing.assert_close(found, features_of(key, 5, 2**24, ids).double(), rtol=0, atol=1e-6)
    assert found.abs().max() <= 1


def test_features_are_even_and_of_their_own() -> None:
    from embcompress.engine.hashing import hash_features
    from embcompress.plan import HashFeatures

    features = hash_features(HashFeatures(7, 64), torch.arange(10_000), torch.float64)
    assert features.mean().abs() < 0.005
    assert features.square().mean() == pytest.approx(1 / 3, rel=0.01)
    correlation = torch.corrcoef(features.T) - torch.eye(64, dtype=torch.float64)
    assert correlation.abs().max() < 0.06


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_bags_pool_the_networks_vectors(mode: str, padding_idx: int | None) -> None:
    module = ec.EmbeddingBag(ROWS, WIDTH, mode=mode, method="dhe", padding_idx=padding_idx)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    head = module.plan.head
    dense = network_of(
        module,
        features_of(head.inputs.key, head.inputs.count, head.inputs.buckets, IDS.tolist()),
    )
    ids, offsets = torch.tensor([1, 3, 3, 7, 999, 3]), torch.tensor([0, 3, 5])
    expected = F.embedding_bag(ids, dense, offsets, mode=mode, padding_idx=padding_idx)
    torch.testing.assert_close(module(ids, offsets), expected, rtol=1e-4, atol=1e-5)


def test_millions_of_ids_cost_what_a_network_costs() -> None:
    module = ec.Embedding(10**12, 16, method="dhe", budget=100_000)
    assert 90_000 < ec.memory(module).total <= 100_000
    assert module(torch.tensor([10**12 - 1])).shape == (1, 16)
    with pytest.raises(IndexError, match="id 1000000000000 at position 0"):
        module(torch.tensor([10**12]))


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
def test_the_fused_update_is_torchs(name: str) -> None:
    def make() -> ec.EmbeddingBag:
        torch.manual_seed(0)
        return ec.EmbeddingBag(ROWS, WIDTH, mode="sum", method="dhe")

    fused, plain = make(), make()
    ec.fuse_optimizer(fused, name, lr=0.01)
    optimizer = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "adam": torch.optim.Adam,
    }[name](plain.parameters(), lr=0.01)
    for k in range(4):
        ids = IDS[k::7].view(-1, 1)[:100]
        optimizer.zero_grad()
        for module in (fused, plain):
            module(ids).square().sum().backward()
        optimizer.step()
    for store, expected in plain.named_parameters():
        torch.testing.assert_close(fused.get_parameter(store), expected, rtol=1e-4, atol=1e-5)
    assert not ec.unfused_parameters(fused)


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_a_collection_of_several_kinds_of_tables(name: str) -> None:
    """Tables that kernels gather, chains that end in torch, and networks, fused together."""
    tables = [
        ec.TableConfig("a", 500, 8, ("x", "y")),
        ec.TableConfig("b", 900, 8),
        ec.TableConfig("c", 300, 8),
    ]
    methods = {"a": "dhe", "b": "tt", "c": "hash"}

    def make() -> ec.EmbeddingBagCollection:
        torch.manual_seed(0)
        bags = {
            table.name: ec.EmbeddingBag(
                table.num_embeddings, 8, mode="sum", method=methods[table.name], name=table.name
            )
            for table in tables
        }
        features = {feature: t.name for t in tables for feature in t.feature_names}
        return ec.EmbeddingBagCollection.from_tables(bags, features)

    fused, plain = make(), make()
    ec.fuse_optimizer(fused, name, lr=0.05)
    kinds = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
    optimizer = kinds[name](plain.parameters(), lr=0.05)
    batch = {n: torch.tensor([[1, 2], [2, 299]]) for n in ("x", "y", "b", "c")}
    for _ in range(3):
        optimizer.zero_grad()
        expected, found = plain(batch), fused(batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        expected.square().sum().backward()
        found.square().sum().backward()
        optimizer.step()
    for store, parameter in plain.named_parameters():
        torch.testing.assert_close(fused.get_parameter(store), parameter, rtol=1e-4, atol=1e-5)


def test_the_network_grows_with_its_budget() -> None:
    table = TableSpec(1_000_000, 16)
    small, large = ec.DeepHash().plan(table, 8), ec.DeepHash().plan(table, 2000)
    assert (small.head.inputs.count, large.head.inputs.count) == (8, 1024)
    assert small.bytes == 4 * (8 * 8 + 8 * 8 + 16 * 8 + 2 * 8 + 16)
    assert large.bytes == 4 * (2000 * 1024 + 2000 * 2000 + 16 * 2000 + 2 * 2000 + 16)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="hashes must be an integer of at least 1, got 0"):
        ec.DeepHash(hashes=0)
    with pytest.raises(ValueError, match="layers must be an integer of at least 1, got 0"):
        ec.DeepHash(layers=0)
    with pytest.raises(ValueError, match="buckets must be at most"):
        ec.DeepHash(buckets=2**24 + 1)
    with pytest.raises(ValueError, match="'dhe' cannot start from a trained table"):
        ec.Embedding.from_pretrained(torch.randn(100, 8), method="dhe", budget="50%")
