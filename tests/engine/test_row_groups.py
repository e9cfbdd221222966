"""Gradients of rows are added up in groups of neighboring rows: every way a group is made of ids.

Gradients are small whole numbers, whose sums are exact in any order: results must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.engine import ops
from embcompress.plan import Digit, LookupPlan, Probe, Store

LEARNING_RATE = 0.25  # exact, too


def anything(rows: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, rows, (count,), generator=generator)


def hot_rows(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """One id is more than half of all, another a fifth; their neighbors are touched, too."""
    ids = anything(rows, count, generator)
    drawn = torch.rand(count, generator=generator)
    ids[drawn < 0.55] = rows // 2
    ids[drawn < 0.2] = rows // 2 + 1
    return ids


def ends(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """The first and the last rows alone."""
    near = torch.randint(0, 3, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.5, near, rows - 1 - near)


#: Rows, width, ids of each feature, and which they are.
CASES: dict[str, tuple[int, int, int, Callable[..., Tensor]]] = {
    "one row": (1, 20_000, 300, anything),  # too wide to be added up in pieces of the batch
    "few ids of very many rows": (5_000_000, 1, 150, anything),
    "ids of very many rows": (5_000_000, 1, 9_000, anything),
    "the ends of very many rows": ((1 << 21) + 1, 2, 700, ends),
    "more rows than a range of bits": ((1 << 18) + 1, 1, 300, ends),
    "many ids of few rows": (300, 64, 20_000, anything),
    "hot rows": (6_000, 4, 60_000, hot_rows),
    "hot rows among wide ones": (700, 130, 9_000, hot_rows),
    "wide rows": (5_000, 300, 8_000, anything),
    "rows wider than a group": (9, 70_000, 30, anything),
}


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass
class Case:
    """A table of some features, ids, one a bag, a gradient, and what it is for each row."""

    collection: ec.EmbeddingBagCollection
    ids: Tensor
    gradient: Tensor
    expected: Tensor

    def backward(self) -> Tensor:
        self.collection(self.ids, torch.arange(len(self.ids) + 1)).backward(self.gradient)
        (weight,) = self.collection.parameters()
        return weight


def make(name: str, num_features: int, sparse: bool = False) -> Case:
    rows, width, count, draw = CASES[name]
    # No id reaches the last row of the store: a table of its own rows alone is left to torch.
    store, probe = Store("rows", rows + 1, width), Probe("rows", Digit(1, rows))
    plan = LookupPlan(rows, width, (store,), (probe,), pool="sum")
    generator = torch.Generator().manual_seed(len(name))
    features = [f"feature {k}" for k in range(num_features)]
    ids = torch.cat([draw(rows, count, generator) for _ in features])
    gradient = torch.randint(-8, 9, (count, width * num_features), generator=generator).float()
    of_ids = torch.cat(list(gradient.split(width, dim=1)))
    expected = torch.zeros(rows + 1, width).index_add_(0, ids, of_ids)
    collection = ec.EmbeddingBagCollection.from_tables(
        {"table": ec.EmbeddingBag.from_plan(plan, sparse=sparse)}, dict.fromkeys(features, "table")
    )
    return Case(collection, ids, gradient, expected)


@pytest.mark.parametrize("num_features", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_dense_gradients(name: str, num_features: int, num_threads: int) -> None:
    case = make(name, num_features)
    assert torch.equal(case.backward().grad, case.expected)


@pytest.mark.parametrize("num_features", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_sparse_gradients(name: str, num_features: int, num_threads: int) -> None:
    """The touched rows, each once and rising."""
    case = make(name, num_features, sparse=True)
    found, touched = case.backward().grad, case.ids.unique()
    if not ops.is_available():  # as torch leaves them
        found = found.coalesce()
    assert torch.equal(found._indices()[0], touched)
    assert torch.equal(found._values(), case.expected[touched])


@pytest.mark.parametrize("num_features", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_updates(name: str, num_features: int, num_threads: int) -> None:
    """Every touched row is updated once, by all of its gradient."""
    case = make(name, num_features)
    (weight,) = case.collection.parameters()
    with torch.no_grad():
        weight.zero_()
    ec.fuse_optimizer(case.collection, "sgd", lr=LEARNING_RATE)
    assert torch.equal(case.backward(), -LEARNING_RATE * case.expected)
