"""Budgets: what is understood, and that they are kept."""

from __future__ import annotations

import pickle
import re
from bisect import bisect_right

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embcompress as ec
from embcompress.budget import (
    BudgetError,
    allocate,
    fit_plan,
    format_bytes,
    parse_budget,
    smallest_plan,
    total_bytes,
)
from embcompress.collection import full_plan
from embcompress.methods import TableSpec, resolve_method

METHODS = sorted(ec.methods())


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (65536, 65536),
        ("65536", 65536),
        ("16MiB", 16 * 2**20),
        ("16 mib", 16 * 2**20),
        ("1.5kB", 1500),
        ("2GB", 2 * 10**9),
        ("5%", 50_000),
        (" 0.1 % ", 1000),
        (0.05, 50_000),
        (1.0, 1_000_000),
        ("100%", 1_000_000),
    ],
)
def test_budgets_that_are_understood(budget: int | float | str, expected: int) -> None:
    assert parse_budget(budget, 1_000_000) == expected


@pytest.mark.parametrize(
    "budget", [0, -1, 0.0, -0.1, 1.5, float("nan"), "0%", "-5%", "", "5 %%", "12XB", "MiB", "1e3"]
)
def test_budgets_that_are_not(budget: int | float | str) -> None:
    with pytest.raises(ValueError, match="budget"):
        parse_budget(budget, 1_000_000)


@pytest.mark.parametrize("budget", ["200%", "100.1%"])
def test_a_share_is_of_the_table(budget: str) -> None:
    message = f"budget '{budget}' is more than the dense float32 table; write at most '100%'"
    with pytest.raises(ValueError, match=message):
        ec.Embedding(1000, 8, method="hash", budget=budget)


@pytest.mark.parametrize("budget", [True, None, [1], b"5%"])
def test_budgets_of_another_type(budget: object) -> None:
    with pytest.raises(TypeError, match="budget must be"):
        parse_budget(budget, 1_000_000)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 10**9), width=st.integers(1, 256), share=st.floats(1e-4, 1.0))
def test_a_plan_never_exceeds_its_budget(method: str, rows: int, width: int, share: float) -> None:
    table, chosen = TableSpec(rows, width, "t"), resolve_method(method)
    budget = max(1, int(share * table.dense_bytes))
    try:
        plan = fit_plan(chosen, table, budget)
    except BudgetError as error:
        assert error.smallest > budget
        assert fit_plan(chosen, table, error.smallest).bytes == error.smallest
        return
    assert plan.bytes <= budget
    # The budget is used as far as the method can: the next size takes more bytes than allowed.
    sizes = chosen.sizes(table)
    larger = next_size_after(chosen, table, plan.bytes)
    assert larger is None or chosen.plan(table, larger).bytes > budget
    assert sizes[0] <= (larger or sizes[-1]) <= sizes[-1]


def next_size_after(method: ec.Method, table: TableSpec, size_bytes: int) -> int | None:
    """The first size that takes more than ``size_bytes``, or None."""
    sizes = method.sizes(table)
    position = bisect_right(sizes, size_bytes, key=lambda size: method.plan(table, size).bytes)
    return sizes[position] if position < len(sizes) else None


@pytest.mark.parametrize("method", ["hash", "qr"])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_at_least_nine_tenths_are_used(method: str, share: float) -> None:
    table = TableSpec(1_000_000, 16)
    budget = int(share * table.dense_bytes)
    assert fit_plan(resolve_method(method), table, budget).bytes >= 0.9 * budget


@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_budget_is_named_and_works(method: str) -> None:
    with pytest.raises(ec.BudgetError, match="smallest budget it can meet is") as caught:
        ec.EmbeddingBag(1000, 16, method=method, budget=1)
    named = int(re.search(r"it can meet is (\d+) bytes", str(caught.value))[1])
    assert named == caught.value.smallest
    assert ec.memory(ec.EmbeddingBag(1000, 16, method=method, budget=named)).total == named
    assert isinstance(caught.value, ValueError)
    assert pickle.loads(pickle.dumps(caught.value)).smallest == named


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("width", [1, 2, 16])
def test_without_a_budget_there_is_always_a_size(method: str, rows: int, width: int) -> None:
    module = ec.Embedding(rows, width, method=method)
    assert module(torch.tensor([rows - 1])).shape == (1, width)
    assert ec.memory(module).total == module.plan.bytes


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    share=st.floats(0.005, 1.0),
)
@example(rows=[1, 2], share=1.0)
def test_one_budget_for_many_tables_is_kept(method: str, rows: list[int], share: float) -> None:
    tables = [TableSpec(count, 16, str(index)) for index, count in enumerate(rows)]
    methods = [resolve_method(method)] * len(tables)
    budget = max(1, int(share * sum(table.dense_bytes for table in tables)))
    try:
        plans = allocate(tables, methods, budget, full_plan)
    except BudgetError as error:
        assert error.smallest > budget
        plans = allocate(tables, methods, error.smallest, full_plan)
        assert total_bytes(plans) <= error.smallest
        return
    assert total_bytes(plans) <= budget
    if not any(store.shared for plan in plans for store in plan.stores):
        assert all(p.bytes <= table.dense_bytes for p, table in zip(plans, tables, strict=True))


def test_small_tables_stay_full_and_large_ones_share_the_rest() -> None:
    tables = [TableSpec(rows, 16, str(rows)) for rows in (10, 1000, 100_000, 200_000)]
    plans = allocate(tables, [resolve_method("hash")] * 4, 1_000_000, full_plan)
    assert [plan.is_dense for plan in plans] == [True, True, False, False]
    assert 0.99 * 1_000_000 <= sum(plan.bytes for plan in plans) <= 1_000_000


def test_smallest_plans_are_the_smallest() -> None:
    table = TableSpec(12345, 16)
    qr = resolve_method("qr")
    sizes = [qr.plan(table, size).bytes for size in qr.sizes(table)]
    assert min(sizes) == sizes[0] == smallest_plan(qr, table).bytes
    assert sizes == sorted(sizes)


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 2**30, 2**50)] == [
        "0 B", "1023 B", "1.5 KiB", "1.0 GiB", "1024.0 TiB",
    ]  # fmt: skip
