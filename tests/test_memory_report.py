"""``ec.memory``: what it counts beside the tables, and what it prints."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.engine.encoding import HEADER_FIELDS, can_encode, encode_plans


@pytest.mark.parametrize("method", list(ec.methods()))
def test_plans_take_what_the_engine_reads(method: str) -> None:
    module = ec.EmbeddingBag(3000, 16, method=method, budget="50%" if method != "full" else None)
    plan = module.built_plan or module.plan
    told = ec.memory(module).plan_bytes
    assert told > 0
    if can_encode(plan):
        numbers = {store.name: number for number, store in enumerate(plan.stores)}
        encoded = encode_plans([plan], [numbers]).tensor
        assert told == encoded.nbytes - HEADER_FIELDS * encoded.itemsize


def test_a_collection_has_the_plans_of_its_tables() -> None:
    tables = [ec.TableConfig(name, 5000, 16) for name in "abc"]
    each = ec.memory(ec.EmbeddingBag(5000, 16, method="hash", budget="10%")).plan_bytes
    assert (
        ec.memory(ec.EmbeddingBagCollection(tables, method="hash", budget="10%")).plan_bytes
        == 3 * each
    )


def test_modules_of_torch_have_no_plan() -> None:
    assert ec.memory(torch.nn.EmbeddingBag(10, 4)).plan_bytes == 0


def test_plans_are_printed_where_they_matter() -> None:
    large = ec.memory(ec.EmbeddingBag(1_000_000, 16, method="hash", budget="1%"))
    assert 100 * large.plan_bytes < large.total
    assert "plan" not in str(large)
    small = ec.memory(ec.EmbeddingBag(1_000_000, 16, method="hash", budget="0.01%"))
    header, *rows = str(small).splitlines()
    assert header.split()[-1] == "plan"
    assert any(row.endswith("688 B") for row in rows), rows
