"""ROBE: chunks of one array for all tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import embcompress as ec
from embcompress.hashing import derive_key, hash_bucket, hash_sign
from embcompress.methods import TableSpec
from embcompress.plan import Store

ROWS, WIDTH = 500, 16
IDS = torch.arange(ROWS)


def chunks_of(
    array: torch.Tensor, name: str, chunk: int, stride: int, width: int, ids: torch.Tensor
) -> torch.Tensor:
    """The formula, id by id."""
    numbers, count = array.flatten(), width // chunk
    places = (len(numbers) - chunk) // stride + 1
    vectors = []
    for id in ids.tolist():
        parts = []
        for t in range(count):
            start = stride * hash_bucket(id, derive_key(7, name, t), places)
            sign = hash_sign(id, derive_key(7, name, count + t))
            parts.append(sign * numbers[start : start + chunk])
        vectors.append(torch.cat(parts))
    return torch.stack(vectors)


@pytest.mark.parametrize(("chunk", "stride"), [(8, 1), (4, 2), (16, 4), (4, 4), (1, 1)])
def test_vectors_are_signed_chunks(chunk: int, stride: int) -> None:
    method = ec.Robe(chunk=chunk, stride=stride)
    module = ec.Embedding(ROWS, WIDTH, method=method, budget="5%", seed=7, name="item")
    assert module.array.numel() * 4 == module.plan.bytes <= 0.05 * ROWS * WIDTH * 4
    assert module.array.numel() + stride > 0.05 * ROWS * WIDTH
    expected = chunks_of(module.array, "item", chunk, stride, WIDTH, IDS)
    assert torch.equal(module(IDS), expected)
    gradient = torch.randn(ROWS, WIDTH)
    (theirs,) = torch.autograd.grad(expected, module.array, gradient)
    (ours,) = torch.autograd.grad(module(IDS), module.array, gradient)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_tables_share_one_array() -> None:
    tables = [ec.TableConfig("user", ROWS, WIDTH), ec.TableConfig("item", 300, 8)]
    collection = ec.EmbeddingBagCollection(tables, method="robe", budget="5%", seed=7)
    array = collection.embedding_bags["user"].array
    assert array is collection.embedding_bags["item"].array
    budget = 0.05 * 4 * (ROWS * WIDTH + 300 * 8)
    assert budget - 4 < ec.memory(collection).total == array.numel() * 4 <= budget
    ids = torch.arange(300)
    user, item = collection({"user": ids, "item": ids}).split((WIDTH, 8), dim=1)
    assert torch.equal(user, chunks_of(array, "user", 8, 1, WIDTH, ids))
    assert torch.equal(item, chunks_of(array, "item", 8, 1, 8, ids))


@pytest.mark.parametrize("ids", [20, 6000])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
def test_a_shared_array_is_updated_as_torch_does(name: str, ids: int) -> None:
    """Numbers that overlapping chunks share take one update of their whole gradient."""
    tables = [ec.TableConfig("a", 20_000, 16), ec.TableConfig("b", 20_000, 16)]

    def make() -> ec.EmbeddingBagCollection:
        torch.manual_seed(0)
        return ec.EmbeddingBagCollection(tables, method="robe", budget=160_000)

    fused, plain = make(), make()
    ec.fuse_optimizer(fused, name, lr=0.05)
    parameters = [plain.embedding_bags["a"].array]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.05),
        "adagrad": lambda: torch.optim.Adagrad(parameters, lr=0.05),
        "adam": lambda: torch.optim.SparseAdam(parameters, lr=0.05),
    }[name]()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        batch = {n: torch.randint(0, 20_000, (ids,), generator=generator) for n in ("a", "b")}
        gradient = torch.randn(ids, 32, generator=generator)
        fused(batch).backward(gradient)
        optimizer.zero_grad()
        plain(batch).backward(gradient)
        if name == "adam":
            parameters[0].grad = parameters[0].grad.to_sparse(1)
        optimizer.step()
    torch.testing.assert_close(fused.embedding_bags["a"].array, parameters[0], rtol=1e-4, atol=1e-5)


def test_compress_and_fit() -> None:
    model = nn.ModuleDict({"a": nn.EmbeddingBag(1000, 16, mode="sum"), "b": nn.Embedding(500, 8)})
    report = ec.compress(model, method="robe", budget="10%")
    assert model["a"].array is model["b"].array
    assert report.budget - 4 < ec.memory(model).total <= report.budget
    weight = ec.Embedding(300, 8, method="robe", budget="30%", seed=3).to_dense()
    fitted = ec.Embedding.from_pretrained(weight, method="robe", budget="30%", seed=3)
    assert (fitted.to_dense() - weight).norm() < 0.05 * weight.norm()


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1, got 0"):
        ec.Robe(chunk=0)
    with pytest.raises(ValueError, match="stride must divide chunk = 8, got 3"):
        ec.Robe(chunk=8, stride=3)
    with pytest.raises(ValueError, match="chunk = 5 does not divide the tables' widths"):
        ec.Embedding(10, 16, method=ec.Robe(chunk=5))
    with pytest.raises(ValueError, match="stride = 4 does not divide the chunks of 2 numbers"):
        ec.Embedding(10, 6, method=ec.Robe(stride=4))
    with pytest.raises(ValueError, match="group must not be empty"):
        ec.Robe(group="")


def test_a_store_of_overlapping_rows() -> None:
    store = Store("s", 10, 6, stride=4)
    assert (store.numbers, store.shape, store.bytes) == (42, (21, 2), 168)
    (plan,) = ec.Robe(stride=2).group_plans([TableSpec(100, 8)], 5)
    assert plan.stores[0] == Store("array", 5, 8, shared="robe", stride=2)
    assert "array 5×8 every 2 float32" in str(plan)
