"""Many tables in one call."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec

TABLES = [
    ec.TableConfig("user", 500, 8),
    ec.TableConfig("word", 3000, 8, ("query", "title"), "mean"),
    ec.TableConfig("tag", 40, 4, mode="max"),
]


def collection(method: str = "hash", budget: str | None = "20%") -> ec.EmbeddingBagCollection:
    torch.manual_seed(0)
    return ec.EmbeddingBagCollection(TABLES, method=method, budget=budget)


FEATURES = {
    "user": torch.tensor([1, 2, 3]),
    "query": torch.tensor([[5, 6], [7, 8], [9, 9]]),
    "title": (torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 3])),
    "tag": torch.nested.nested_tensor([torch.arange(2), torch.arange(5), torch.arange(0)],
                                      layout=torch.jagged),
}  # fmt: skip


@pytest.mark.parametrize("method", sorted(ec.methods()))
def test_one_call_equals_a_call_for_each_table(method: str) -> None:
    module = collection(method, None)
    bags = module.embedding_bags
    expected = [
        bags["user"](FEATURES["user"][:, None]),
        bags["word"](FEATURES["query"]),
        bags["word"](*FEATURES["title"]),
        bags["tag"](FEATURES["tag"]),
    ]
    actual = module(FEATURES)
    assert module.feature_names == ("user", "query", "title", "tag")
    assert module.embedding_dims == (8, 8, 8, 4)
    torch.testing.assert_close(actual, torch.cat(expected, dim=1))


@pytest.mark.parametrize("tables", [TABLES, TABLES[:2]], ids=["maxima, too", "sums and means"])
@pytest.mark.parametrize("method", sorted(ec.methods()))
def test_without_gradients_the_same(method: str, tables: list[ec.TableConfig]) -> None:
    """Where nothing is to be trained, one operator call does all, of plans that allow it."""
    torch.manual_seed(0)
    module = ec.EmbeddingBagCollection(tables, method=method)
    features = {name: FEATURES[name] for name in module.feature_names}
    expected = module(features)
    with torch.no_grad():
        actual = module(features)
    assert torch.equal(actual, expected) and not actual.requires_grad


@pytest.mark.parametrize("ids", [[1, 2, 3, 500], [1, -1, 2, 3]])
@pytest.mark.parametrize("offsets", [[0, 1, 2, 3, 4], [0, 2, 1, 3, 4], [1, 1, 2, 3, 4], [0, 1, 2]])
def test_without_gradients_errors_are_the_same(ids: list[int], offsets: list[int]) -> None:
    """They name the argument and the value."""
    tables = [ec.TableConfig("a", 500, 8), ec.TableConfig("b", 500, 8)]
    module = ec.EmbeddingBagCollection(tables, method="hash", budget="20%")
    with pytest.raises((IndexError, ValueError)) as expected:
        module(torch.tensor(ids), torch.tensor(offsets))
    with torch.no_grad(), pytest.raises(expected.type) as actual:
        module(torch.tensor(ids), torch.tensor(offsets))
    assert str(actual.value) == str(expected.value)


def test_without_gradients_a_parametrized_store_is_computed() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    module = ec.EmbeddingBagCollection(TABLES[:2], method="hash", budget="20%")
    features = {name: FEATURES[name] for name in module.feature_names}
    user = module.embedding_bags["user"]
    (store,) = user.stores()
    with torch.no_grad():
        before = module(features)
        torch.nn.utils.parametrize.register_parametrization(user, store, Doubled())
        after = module(features)
    assert torch.equal(after[:, :8], 2 * before[:, :8])
    assert torch.equal(after[:, 8:], before[:, 8:])


def test_feature_major_ids_and_a_mapping_are_the_same() -> None:
    module = collection()
    ids = torch.tensor([1, 2, 3, 5, 6, 7, 8, 9, 9, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4])
    offsets = torch.tensor([0, 1, 2, 3, 5, 7, 9, 9, 12, 13, 15, 20, 20])
    assert torch.equal(module(ids, offsets), module(FEATURES))


def test_weights_reach_the_features_that_have_them() -> None:
    tables = [ec.TableConfig("a", 100, 4), ec.TableConfig("b", 100, 4)]
    module = ec.EmbeddingBagCollection(tables, method="hash", budget="50%")
    ids, offsets, weights = torch.tensor([1, 2, 3]), torch.tensor([0, 1]), torch.randn(3)
    out = module({"a": (ids, offsets, weights), "b": (ids, offsets)})
    expected = module.embedding_bags["a"](ids, offsets, weights)
    torch.testing.assert_close(out[:, :4], expected)


def test_the_budget_is_for_all_tables_together() -> None:
    for method in ("hash", "qr", "low_dim"):
        module = collection(method, "30%")
        assert 0 < ec.memory(module).total <= 0.3 * ec.memory(module).dense
    with pytest.raises(ec.BudgetError):
        collection("low_dim", "1%")


def test_plans_stand_for_a_budget() -> None:
    tables = [ec.TableConfig("user", 500, 8), ec.TableConfig("item", 900, 8)]
    first = ec.EmbeddingBagCollection(tables, method="qr", budget="10%")
    plans = [bag.plan for bag in first.embedding_bags.values()]
    again = ec.EmbeddingBagCollection(tables, method="qr", plans=plans)
    assert [bag.plan for bag in again.embedding_bags.values()] == plans
    for message, arguments in (
        ("either plans or a budget, not both; got a budget of '10%'", {"budget": "10%"}),
        ("one a table: 1 for 2 tables", {"plans": plans[:1]}),
        ("'user' is of 900 × 8, the table of 500 × 8", {"plans": plans[::-1]}),
    ):
        with pytest.raises(ValueError, match=message):
            ec.EmbeddingBagCollection(tables, method="qr", **{"plans": plans, **arguments})


def test_vectors_do_not_depend_on_the_order_of_the_tables() -> None:
    ordered = collection(budget=None)
    reverse = ec.EmbeddingBagCollection(TABLES[::-1], method="hash")
    for name, bag in ordered.embedding_bags.items():
        assert reverse.embedding_bags[name].plan == bag.plan


def test_state_and_errors() -> None:
    module, twin = collection(), collection()
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(FEATURES), module(FEATURES))
    with pytest.raises(ValueError, match=r"lacks the features \['tag'\]"):
        module({name: FEATURES[name] for name in ("user", "query", "title")})
    with pytest.raises(ValueError, match="different batch sizes"):
        module({**FEATURES, "user": torch.tensor([1])})
    with pytest.raises(TypeError, match="feature 'user'"):
        module({**FEATURES, "user": torch.tensor([1.0, 2.0, 3.0])})
    with pytest.raises(IndexError, match="id 500"):
        module({**FEATURES, "user": torch.tensor([1, 500, 2])})
    with pytest.raises(ValueError, match=r"13 entries|features \* B"):
        module(torch.arange(3), torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="must be unique"):
        ec.EmbeddingBagCollection([TABLES[0], TABLES[0]])
    with pytest.raises(ValueError, match="cannot name a module"):
        ec.EmbeddingBagCollection([ec.TableConfig("items", 10, 4)])
