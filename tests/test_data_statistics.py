"""compress(data=…) with any method: counts and company of ids, read off the model's own lookups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embcompress as ec
from embcompress.approximation.co_occurrence import CoOccurrence, Occurrences, add_company
from embcompress.planner import lookups

USERS, ITEMS, WIDTH = 40, 60, 8
Batch = tuple[tuple[Tensor, ...], Tensor]


class Model(nn.Module):
    """A table of users, and one of items that is asked twice: for bags, and for single ids."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user = nn.Embedding(USERS, WIDTH)
        self.items = nn.EmbeddingBag(ITEMS, WIDTH, mode="sum", padding_idx=0)
        self.last = nn.Embedding(ITEMS, WIDTH)
        if tied:
            self.last.weight = self.items.weight

    def forward(self, user: Tensor, items: Tensor, last: Tensor) -> Tensor:
        return (self.user(user) * (self.items(items) + self.last(last))).sum(1)


def batches(count: int = 8, size: int = 16) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    return [
        ((draw(USERS, size), draw(ITEMS, size, 3), draw(ITEMS, size)), draw(2, size).float())
        for _ in range(count)
    ]


def counts_of(data: list[Batch], tied: bool = False) -> dict[str, Tensor]:
    user, items, last = (
        torch.cat([inputs[number].reshape(-1) for inputs, _ in data]) for number in range(3)
    )
    if tied:
        items = torch.cat([items, last])
    counts = {"user": user.bincount(minlength=USERS), "items": items.bincount(minlength=ITEMS)}
    return counts if tied else {**counts, "last": last.bincount(minlength=ITEMS)}


def company_of(data: list[Batch], tied: bool = False) -> dict[str, Tensor]:
    """The same by loops over examples; the padding id has and is no company."""
    samples = {"user": CoOccurrence(USERS), "items": CoOccurrence(ITEMS)}
    samples["last"] = samples["items"] if tied else CoOccurrence(ITEMS)
    for inputs, labels in data:
        for example in range(len(labels)):
            features = []
            for name, ids in zip(("user", "items", "last"), inputs, strict=True):
                own = ids[example].reshape(-1)
                own = own[own != 0] if name == "items" else own
                features.append(Occurrences(name, own, torch.zeros_like(own)))
            add_company(samples, features)
    return {name: each.samples() for name, each in samples.items() if not tied or name != "last"}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["pruned", "mpe", "double_hash"])
def test_counts_come_from_the_data(method: str, tied: bool) -> None:
    seen, given = Model(tied), Model(tied)
    torch.manual_seed(3)
    ec.compress(seen, method=method, budget="60%", data=batches())
    torch.manual_seed(3)
    ec.compress(given, method=method, budget="60%", counts=counts_of(batches(), tied))
    assert_same(seen, given)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["lma", "anchors"])
def test_company_comes_from_the_data(method: str, tied: bool) -> None:
    seen, given, plain = Model(tied), Model(tied), Model(tied)
    data = batches()
    arguments: dict[str, Any] = {"method": method, "budget": "70%"}
    counts = counts_of(data, tied)
    for model, known in (
        (seen, {"data": data}),
        (given, {"counts": counts, "co_occurrence": company_of(data, tied)}),
        (plain, {"counts": counts}),
    ):
        torch.manual_seed(3)
        text = str(ec.compress(model, **arguments, **known))
        assert ("no likeness is known: give data= or co_occurrence=" in text) == (model is plain)
    assert_same(seen, given)
    assert any(
        not torch.equal(value, plain.state_dict().get(key, torch.empty(0)))
        for key, value in seen.state_dict().items()
    )


def test_what_is_given_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches()
    monkeypatch.setattr(lookups, "call_model", lambda *details: pytest.fail("was called"))
    ec.compress(
        Model(), method="lma", budget="70%", data=data,
        counts=counts_of(data), co_occurrence=company_of(data),
    )  # fmt: skip


def test_many_pairs_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(8)
    called: list[object] = []
    call = lookups.call_model
    monkeypatch.setattr(
        lookups, "call_model", lambda model, inputs: (called.append(inputs), call(model, inputs))[1]
    )
    # An example's user occurs with four items, or fewer where one is padding.
    monkeypatch.setattr(lookups, "_MOST_PAIRS", 2 * 4 * 16 + 2)
    model = Model()
    features = {model.user: "user", model.items: "items", model.last: "last"}
    lookups.sample_company(model, features, {"user": CoOccurrence(USERS)}, data)
    assert [id(each) for each in called] == [id(data[at][0]) for at in (0, 0, 4)]


@pytest.mark.parametrize("given", ["nothing", "offsets", "nested"])
def test_bags_in_every_form(given: str) -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            last = given == "offsets"
            self.items = nn.EmbeddingBag(ITEMS, WIDTH, mode="sum", include_last_offset=last)

        def forward(self, *arguments: Tensor) -> Tensor:
            return self.items(*arguments).sum(1)

    rows = [torch.tensor(row) for row in ([1, 2], [3, 4], [1, 5])]
    inputs: tuple[Tensor, ...] = (torch.stack(rows),)
    if given == "offsets":
        inputs = (torch.cat(rows), torch.tensor([0, 2, 4, 6]))
    if given == "nested":
        inputs = (torch.nested.nested_tensor(rows, layout=torch.jagged),)
    model = Bags()
    [[seen]] = lookups.read_lookups(model, [model.items], [(inputs, torch.zeros(3))])
    assert seen.ids.tolist() == [1, 2, 3, 4, 1, 5]
    assert seen.rows().tolist() == [0, 0, 1, 1, 2, 2]


def test_a_call_that_is_not_by_example_is_no_company() -> None:
    class Flat(Model):
        def forward(self, user: Tensor, items: Tensor, last: Tensor) -> Tensor:
            vectors = self.items(items) + self.last(last)
            return (self.user(user.repeat(2))[: len(user)] * vectors).sum(1)

    text = str(
        ec.compress(Flat(), method={"user": "lma", "items": "lma"}, budget="70%", data=batches())
    )
    lines = [line for line in text.splitlines() if "no likeness is known" in line]
    assert len(lines) == 1 and "user" in lines[0]


def test_trained_tables_are_fitted_by_counts() -> None:
    seen, given, plain = Model(), Model(), Model()
    data = batches()
    for model, known in ((seen, {"data": data}), (given, {"counts": counts_of(data)}), (plain, {})):
        ec.compress(model, method="low_dim", budget="50%", keep_weights=True, **known)
    assert_same(seen, given)
    assert not torch.equal(seen.items.weight, plain.items.weight)
