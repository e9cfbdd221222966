"""compress() swaps TorchRec's collections; ours take and give what theirs do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

torchrec = pytest.importorskip("torchrec")
pytest.importorskip("fbgemm_gpu")

import embcompress as ec  # noqa: E402
import embcompress.torchrec as et  # noqa: E402
from tests.torchrec.model import Model, batch, loss  # noqa: E402


def _full(model: Model) -> Model:
    """The model with this library's collections over its own, uncompressed tables."""
    from embcompress.torchrec.swapping import _compressed

    return nn.ModuleDict({"bags": _compressed(model.bags), "rows": _compressed(model.rows)})


@pytest.mark.parametrize("is_weighted", [False, True])
def test_full_tables_give_what_torchrec_gives(is_weighted: bool) -> None:
    torch.manual_seed(0)
    model = Model(is_weighted=is_weighted)
    ours = _full(model)
    features, _ = batch(0, 9, is_weighted=is_weighted)
    expected, got = model.bags(features), ours["bags"](features)
    assert got.keys() == expected.keys() == ["user@users", "friend", "clicked", "user@articles",
                                             "country"]  # fmt: skip
    assert got.length_per_key() == expected.length_per_key()
    torch.testing.assert_close(got.values(), expected.values(), rtol=0, atol=1e-7)
    expected_rows, got_rows = model.rows(features), ours["rows"](features)
    assert got_rows.keys() == expected_rows.keys()
    for name, jagged in expected_rows.items():
        assert torch.equal(got_rows[name].values(), jagged.values())
        assert torch.equal(got_rows[name].lengths(), jagged.lengths())


def test_collections_are_swapped_under_one_budget() -> None:
    torch.manual_seed(0)
    model = Model()
    report = ec.compress(model, method="hash", budget="10%")
    assert isinstance(model.bags, et.CompressedEmbeddingBagCollection)
    assert isinstance(model.rows, et.CompressedEmbeddingCollection)
    assert report.after == ec.memory(model).total <= 0.1 * report.before
    assert report.tables[0].name == "bags.embedding_bags.users"
    assert [config.name for config in model.bags.embedding_bag_configs()] == [
        "users", "articles", "countries",
    ]  # fmt: skip
    # One table for two features, and two tables for one feature.
    features, labels = batch(0, 9)
    pooled = model.bags(features).to_dict()
    ids = features["friend"]
    table = model.bags.embedding_bags["users"]
    torch.testing.assert_close(pooled["friend"], table(ids.values(), ids.offsets()))
    loss(model, features, labels).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.bags.embedding_bags["countries"].plan.is_dense


def test_weights_are_used_as_torchrec_does() -> None:
    torch.manual_seed(0)
    model = Model(is_weighted=True)
    ec.compress(model, method="qr", budget="30%")
    features, _ = batch(1, 6, is_weighted=True)
    features.weights().requires_grad_()
    pooled = model.bags(features).to_dict()["clicked"]
    own = features["clicked"]
    table = model.bags.embedding_bags["articles"]
    torch.testing.assert_close(pooled, table(own.values(), own.offsets(), own.weights()))
    pooled.sum().backward()
    assert features.weights().grad is not None
    unweighted, _ = batch(1, 6)
    with pytest.raises(ValueError, match="is_weighted"):
        model.bags(unweighted)
    plain = Model()
    ec.compress(plain, method="qr", budget="30%")
    torch.testing.assert_close(  # TorchRec ignores weights that it does not expect
        plain.bags(features).values(), plain.bags(unweighted).values()
    )


def test_wrong_features_are_errors() -> None:
    model = Model()
    ec.compress(model, method="hash", budget="10%")
    features, _ = batch(0, 4)
    with pytest.raises(ValueError, match=r"lacks \['user'\]"):
        model.bags(torchrec.KeyedJaggedTensor(["friend", "clicked", "country"],
            torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1])))  # fmt: skip
    features.values()[:] = 10**12
    with pytest.raises(IndexError, match="1000000000000"):
        model.bags(features)
    several = torchrec.KeyedJaggedTensor(
        ["user", "friend", "clicked", "country"],
        torch.arange(5),
        lengths=torch.ones(5, dtype=torch.int64),
        stride_per_key_per_rank=[[2], [1], [1], [1]],
    )
    with pytest.raises(ValueError, match="different batch sizes"):
        model.bags(several)


class _Subclass(torchrec.EmbeddingBagCollection):
    pass


def _config(name: str) -> torchrec.EmbeddingBagConfig:
    return torchrec.EmbeddingBagConfig(
        name=name, num_embeddings=1000, embedding_dim=8, feature_names=[name]
    )


def test_collections_that_cannot_be_swapped_keep_their_tables() -> None:
    hooked = torchrec.EmbeddingBagCollection([_config("a")])
    hooked.register_forward_hook(lambda *_: None)
    table_hooked = torchrec.EmbeddingBagCollection([_config("b"), _config("c")])
    table_hooked.embedding_bags["b"].register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {"subclass": _Subclass([_config("s")]), "hooked": hooked, "table": table_hooked}
    )
    model["plain"] = torchrec.EmbeddingBagCollection([_config("d")])
    report = ec.compress(model, method="hash", budget="10%")
    notes = {table.name.split(".")[-1]: table.note for table in report.tables}
    assert "_Subclass" in notes["s"] and "hooks" in notes["a"]
    assert "not as TorchRec made it" in notes["c"] and notes["d"] == ""
    assert type(model["plain"]) is et.CompressedEmbeddingBagCollection
    assert type(model["table"]) is torchrec.EmbeddingBagCollection
    with pytest.raises(ValueError, match="is itself a collection"):
        ec.compress(torchrec.EmbeddingBagCollection([_config("e")]), method="hash", budget="10%")


def test_tables_that_are_left_full_keep_their_parameter() -> None:
    collection = torchrec.EmbeddingBagCollection([_config("a"), _config("b")])
    weight = collection.embedding_bags["b"].weight
    weight.requires_grad_(False)
    model = nn.ModuleDict({"bags": collection})
    report = ec.compress(model, method="hash", budget="10%")
    assert "frozen" in report.tables[1].note
    assert model["bags"].embedding_bags["b"].weight is weight


def test_trained_tables_are_approximated() -> None:
    torch.manual_seed(0)
    model = Model()
    features, _ = batch(0, 5)
    expected = model.bags(features).values()
    report = ec.compress(model, method="int8", budget="40%", keep_weights=True)
    assert max(table.error or 0.0 for table in report.tables) < 0.02
    torch.testing.assert_close(model.bags(features).values(), expected, rtol=0, atol=1e-3)


def test_procedures_and_fused_optimizers_reach_the_tables() -> None:
    torch.manual_seed(0)
    model = Model()
    ec.compress(model, method=ec.Pruned(interval=2), budget="20%")
    ec.fuse_optimizer(model, "adagrad", lr=0.1)
    procedure = ec.TrainingProcedure(model)
    before = model.bags.embedding_bags["users"].weight.detach().clone()
    for step in range(6):
        features, labels = batch(step, 16)
        loss(model, features, labels).backward()
        procedure.step()
    assert not torch.equal(before, model.bags.embedding_bags["users"].weight)
    assert sum(int(table.tensor("moves")) for table in procedure.tables.values()) > 0
