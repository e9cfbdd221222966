"""Fused optimizers equal torch's, on every method, and their state is kept."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import embcompress as ec
from embcompress.engine import ops
from embcompress.optimizers import unfused_parameters
from embcompress.plan import Digit, LookupPlan, Probe, Store

METHODS = sorted(ec.methods())
TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adam": lambda p: torch.optim.SparseAdam(p, lr=0.05),
}


def table(method: str, sparse: bool = False) -> ec.EmbeddingBag:
    torch.manual_seed(0)
    return ec.EmbeddingBag(200, 8, mode="sum", method=method, sparse=sparse)


def batches() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 200, (30,), generator=generator),
            torch.tensor([0, 0, 7, 8, 20]),
            torch.randn(5, 8, generator=generator),
        )
        for _ in range(6)
    ]


def train(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    for ids, offsets, gradient in batches():
        if optimizer is not None:
            optimizer.zero_grad()
        module(ids, offsets).backward(gradient)
        if optimizer is not None:
            optimizer.step()


@pytest.mark.parametrize("engine", ["kernel", "torch"])
@pytest.mark.parametrize("name", sorted(TORCH))
@pytest.mark.parametrize("method", METHODS)
def test_the_fused_update_is_torchs(
    method: str, name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "torch":
        monkeypatch.setattr("embcompress.engine.ops.is_available", lambda: False)
    fused, plain = table(method), table(method, sparse=name == "adam")
    if name == "adam" and fused.plan.head_stores:
        pytest.skip("torch's SparseAdam refuses the dense gradient of a head")
    ec.fuse_optimizer(fused, name, lr=0.05)
    train(fused, None)
    train(plain, TORCH[name](plain.parameters()))
    # A latent that lies between two codes may be rounded to the other one by the last bit.
    tolerance = 1e-3 if fused.latents() else 1e-5
    for store, expected in plain.named_parameters():
        actual = fused.get_parameter(store)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=tolerance, check_dtype=True)


@pytest.mark.parametrize("method", METHODS)
def test_rowwise_adagrad_is_its_formula(method: str) -> None:
    fused, plain = table(method), table(method)
    ec.fuse_optimizer(fused, "rowwise_adagrad", lr=0.05, eps=1e-6, weight_decay=0.01)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros(p.shape[0], 1) for name, p in trained.items()}
    for ids, offsets, gradient in batches():
        fused(ids, offsets).backward(gradient)
        plain.zero_grad()
        plain(ids, offsets).backward(gradient)
        with torch.no_grad():
            for name, p in trained.items():
                gradient = p.grad.to_dense()
                is_head = name in plain.plan.head_stores
                touched = gradient.any(1, keepdim=True).float()
                if is_head:
                    touched[:] = 1
                if name in plain.latents() and len(p) == plain.num_embeddings:
                    touched[ids] = 1  # also rows whose latents all lie outside of their codes
                g = (gradient + 0.01 * p) * touched
                sums[name] += (g * g).mean(1, keepdim=True)
                p -= 0.05 * g / (sums[name].sqrt() + 1e-6)
    for name, expected in plain.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_state_is_saved_and_goes_on(method: str) -> None:
    whole, half = table(method), table(method)
    for module in (whole, half):
        ec.fuse_optimizer(module, "adam", lr=0.05)
    all_batches = batches()
    for ids, offsets, gradient in all_batches:
        whole(ids, offsets).backward(gradient)
    for ids, offsets, gradient in all_batches[:3]:
        half(ids, offsets).backward(gradient)
    resumed = table(method)
    ec.fuse_optimizer(resumed, "adam", lr=0.05)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    for ids, offsets, gradient in all_batches[3:]:
        resumed(ids, offsets).backward(gradient)
    for name, expected in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(name), expected)


@pytest.mark.parametrize("engine", ["kernel", "torch"])
def test_adam_of_a_head_is_torchs(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's moments are corrected for as many steps as it has taken."""
    if engine == "torch":
        monkeypatch.setattr("embcompress.engine.ops.is_available", lambda: False)
    fused, plain = table("low_dim"), table("low_dim")
    head = plain.plan.head.weight
    ec.fuse_optimizer(fused, "adam", lr=0.05)
    optimizer = torch.optim.Adam([plain.get_parameter(head)], lr=0.05)
    rest = [p for name, p in plain.named_parameters() if name != head]
    for ids, offsets, gradient in batches():
        with torch.no_grad():  # the other stores are another test's
            for name, p in plain.named_parameters():
                if name != head:
                    p.copy_(fused.get_parameter(name))
        plain.zero_grad()
        plain(ids, offsets).backward(gradient)
        fused(ids, offsets).backward(gradient)
        optimizer.step()
    assert rest
    expected = plain.get_parameter(head)
    torch.testing.assert_close(fused.get_parameter(head), expected, rtol=1e-4, atol=1e-5)
    assert int(fused.optimizer_step(head)) == len(batches())


def test_a_frozen_store_is_not_updated() -> None:
    module = table("qr")
    names = [name for name, _ in module.named_parameters()]
    frozen, before = module.get_parameter(names[0]), module.state_dict()[names[0]].clone()
    frozen.requires_grad_(False)
    ec.fuse_optimizer(module, "sgd", lr=0.1)
    other = module.get_parameter(names[1]).clone()
    for ids, offsets, gradient in batches():
        module(ids, offsets).backward(gradient)
    assert torch.equal(frozen, before) and not torch.equal(module.get_parameter(names[1]), other)


def test_state_is_reported_as_training_memory() -> None:
    module = table("hash")
    before = ec.memory(module)
    ec.fuse_optimizer(module, "rowwise_adagrad", lr=0.05)
    after = ec.memory(module)
    assert after.total == before.total and before.training == 0
    assert after.training == module.plan.stores[0].rows * 4 + 8  # a sum a row, and a step


def test_a_collection_with_a_shared_table() -> None:
    tables = [ec.TableConfig("a", 100, 8, ("x", "y")), ec.TableConfig("b", 300, 8)]

    def make() -> ec.EmbeddingBagCollection:
        torch.manual_seed(0)
        return ec.EmbeddingBagCollection(tables, method="qr")

    fused, plain = make(), make()
    ec.fuse_optimizer(fused, "adagrad", lr=0.1)
    optimizer = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    features = {"x": torch.tensor([1, 2]), "y": torch.tensor([2, 9]), "b": torch.tensor([5, 250])}
    for _ in range(3):
        fused(features).pow(2).sum().backward()
        optimizer.zero_grad()
        plain(features).pow(2).sum().backward()
        optimizer.step()
    for name, expected in plain.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["kernel", "torch"])
def test_a_collection_leaves_untouched_rows_alone(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "torch":
        monkeypatch.setattr("embcompress.engine.ops.is_available", lambda: False)
    torch.manual_seed(0)
    tables = [ec.TableConfig("a", 100, 8), ec.TableConfig("b", 300, 8)]
    collection = ec.EmbeddingBagCollection(tables, method="hash")
    ec.fuse_optimizer(collection, "adam", lr=0.1)
    rows = {}
    for id in (0, 1):
        collection({"a": torch.tensor([id]), "b": torch.tensor([id])}).sum().backward()
        rows[id] = {name: p.detach().clone() for name, p in collection.named_parameters()}
    for name, after in rows[1].items():
        assert int((after != rows[0][name]).any(1).sum()) == 1


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_a_collection_with_maxima(name: str) -> None:
    """It is looked up feature by feature, and every feature's table is updated."""
    tables = [ec.TableConfig("a", 100, 8, mode="max"), ec.TableConfig("b", 300, 8)]

    def make() -> ec.EmbeddingBagCollection:
        torch.manual_seed(0)
        return ec.EmbeddingBagCollection(tables, method="qr")

    fused, plain = make(), make()
    ec.fuse_optimizer(fused, name, lr=0.05)
    optimizer = TORCH[name](plain.parameters())
    features = {"a": torch.tensor([[1, 2], [2, 9]]), "b": torch.tensor([5, 250])}
    for _ in range(3):
        fused(features).pow(2).sum().backward()
        optimizer.zero_grad()
        plain(features).pow(2).sum().backward()
        optimizer.step()
    for store, expected in plain.named_parameters():
        torch.testing.assert_close(fused.get_parameter(store), expected, rtol=1e-5, atol=1e-6)


def mixed_collection(kind: str, first: bool) -> ec.EmbeddingBagCollection:
    """Two tables, of which the odd one, the first or the last, is updated in another way."""
    torch.manual_seed(0)
    weight, threshold = Store("weight", 100, 8), Store("weight_threshold", 1, 8)
    if kind == "half":
        weight = replace(weight, dtype="float16")
    stores = (weight,)
    if kind == "threshold":
        stores = (replace(weight, threshold=threshold.name), threshold)
    plan = LookupPlan(100, 8, stores=stores, probes=(Probe("weight", Digit(1, 100)),))
    tables = {
        "odd": ec.EmbeddingBag.from_plan(plan.with_pool("sum"), sparse=kind == "sparse"),
        "plain": ec.EmbeddingBag(300, 8, method="qr", mode="sum"),
    }
    if kind == "frozen":
        tables["odd"].requires_grad_(False)
    features = {name: name for name in tables}
    return ec.EmbeddingBagCollection.from_tables(
        tables, features if first else dict(reversed(features.items()))
    )


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["threshold", "half", "frozen", "sparse"])
def test_all_tables_of_a_mixed_collection_learn(kind: str, first: bool) -> None:
    """Tables that the kernels update stand beside others, and one step is that of each alone."""
    together, alone = mixed_collection(kind, first), mixed_collection(kind, first)
    ec.fuse_optimizer(together, "adagrad", lr=0.05)
    ec.fuse_optimizer(alone, "adagrad", lr=0.05)
    ids = {"odd": torch.tensor([[1, 2], [2, 9]]), "plain": torch.tensor([[5], [250]])}
    before = {name: value.clone() for name, value in together.named_parameters()}
    for _ in range(2):
        together(ids).pow(2).sum().backward()
        parts = [alone.embedding_bags[name](bags) for name, bags in ids.items()]
        torch.cat(parts, 1).pow(2).sum().backward()
    for name, expected in alone.named_parameters():
        assert torch.equal(together.get_parameter(name), expected)
        is_frozen = kind == "frozen" and "odd" in name
        assert torch.equal(expected, before[name]) == is_frozen


def test_a_collection_is_fused_as_a_whole() -> None:
    tables = [ec.TableConfig("a", 100, 8), ec.TableConfig("b", 300, 8)]
    collection = ec.EmbeddingBagCollection(tables, method="qr")
    ec.fuse_optimizer(collection.embedding_bags["a"], "sgd", lr=0.1)
    with pytest.raises(ValueError, match="fuse the whole collection"):
        collection({"a": torch.tensor([1]), "b": torch.tensor([2])})


@pytest.mark.skipif(not ops.is_available(), reason="the C++ extension is not built")
def test_weights_that_the_kernels_do_not_take_are_refused() -> None:
    module = table("hash")
    ec.fuse_optimizer(module, "sgd", lr=0.1)
    ids, offsets, _ = batches()[0]
    with pytest.raises(TypeError, match=r"call \.float\(\) on the weights"):
        module(ids, offsets, torch.ones(len(ids), dtype=torch.float64))


def test_the_rate_can_be_scheduled_and_evaluation_changes_nothing() -> None:
    module = table("hash")
    rule = ec.fuse_optimizer(module, "sgd", lr=0.1)
    ids, offsets, gradient = batches()[0]
    before = module.weight.clone()
    with torch.no_grad():
        module(ids, offsets)
    assert torch.equal(module.weight, before)
    rule.lr = 1e-30
    module(ids, offsets).backward(gradient)
    assert torch.equal(module.weight, before)


def test_the_other_parameters_are_left_to_the_user() -> None:
    model = nn.ModuleDict({"table": table("low_dim"), "layer": nn.Linear(8, 1)})
    ec.fuse_optimizer(model, "sgd", lr=0.1)
    assert {id(p) for p in unfused_parameters(model)} == {
        id(p) for p in model["layer"].parameters()
    }


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; known: sgd"):
        ec.fuse_optimizer(table("hash"), "lion", lr=0.1)
    with pytest.raises(ValueError, match="lr must be positive"):
        ec.fuse_optimizer(table("hash"), "sgd", lr=0.0)
    with pytest.raises(ValueError, match="contains no table"):
        ec.fuse_optimizer(nn.Linear(2, 2), "sgd", lr=0.1)
    module = table("hash")
    ec.fuse_optimizer(module, "sgd", lr=0.1)
    with pytest.raises(ValueError, match="already"):
        ec.fuse_optimizer(module, "sgd", lr=0.1)
