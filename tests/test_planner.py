"""The planner: its closed forms, the plans it makes of them, and its words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.budget import allocate, fit_group
from embcompress.collection import full_plan
from embcompress.methods.auto import _plan as auto_plan
from embcompress.methods.base import TableSpec
from embcompress.plan import LookupPlan, total_bytes
from embcompress.planner.even import TIE, even_plans, tables_frontier
from embcompress.planner.loss import QUANTIZATION_LOSS, Head, table_value
from embcompress.planner.options import Choices, Hot, HotRows, Option

METHODS = [
    ec.Auto(),
    ec.Auto(narrowness=3.0, even=False),
    ec.Auto(share_projection=False, chunks=1),
    ec.Auto(hot=False, chunks=3),
    ec.Auto(few=True, narrowness=0.9, even=False),
]


def power_law(ids: int, total: int, seed: int = 0) -> Tensor:
    """Counts of ``total`` draws from a power law, in no order."""
    rng = np.random.default_rng(seed)
    mass = 1 / (np.arange(ids) + 2) ** 1.1
    counts = rng.multinomial(total, mass / mass.sum())
    return torch.from_numpy(rng.permutation(counts))


def tables(dim: int = 16) -> list[TableSpec]:
    return [
        TableSpec(size, dim, f"t{size}", counts=power_law(size, 200_000))
        for size in (3, 40, 900, 20_000)
    ]


# ------------------------------------------------------------------------------- closed forms


def test_the_value_of_a_table_is_the_entropy_of_its_ids() -> None:
    counts = torch.tensor([10_000_000, 10_000_000, 20_000_000, 0])  # often enough to be learned
    value = table_value(TableSpec(4, 8, counts=counts))
    assert value.value == pytest.approx(1.5, rel=1e-5)
    assert value.rows == (1, 2, 3, 4) or value.rows[-1] == 4
    assert value.kept[0] == 0 and value.kept[-1] == pytest.approx(1)
    seen_once = table_value(TableSpec(4, 8, counts=torch.ones(4, dtype=torch.int64)))
    assert seen_once.value == pytest.approx(2 / 5)  # one of 1 + 4 examples' worth is learned


def test_sharing_keeps_what_the_formula_says() -> None:
    counts = power_law(300, 10_000)
    value = table_value(TableSpec(300, 8, counts=counts))
    p = counts.double() / counts.sum()
    mass = p * counts / (counts + 4)
    for rows, kept in zip(value.rows[1:-1], value.kept[1:-1], strict=True):
        own = p / (p + (1 - p) / rows)
        assert kept == pytest.approx(float((mass * own).sum() / mass.sum()))
    order = counts.argsort(descending=True, stable=True)
    for head in value.heads:
        tail = order[head.ids :]
        assert head.share == pytest.approx(1 - float(mass[tail].sum() / mass.sum()))
        own = (p / (p + (1 - p) / value.rows[5]))[tail]
        assert head.kept[5] == pytest.approx(float((mass[tail] * own).sum() / mass.sum()))
    assert [head.ids for head in value.heads] == [
        1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63, 95, 127, 191, 255,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 1000, 10_000_000_000])
def test_without_counts_a_power_law_is_assumed(size: int) -> None:
    value = table_value(TableSpec(size, 8))
    assert value.rows[-1] == size and value.kept[-1] == pytest.approx(1)
    assert list(value.kept) == sorted(value.kept) and value.heads == ()
    assert (value.value > 0) == (size > 1)


def test_a_table_that_is_never_asked_is_worth_nothing() -> None:
    assert table_value(TableSpec(9, 8, counts=torch.zeros(9))).value == 0


# ----------------------------------------------------------------------------------- frontier


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 4])
def test_plans_take_the_bytes_that_were_expected(method: ec.Auto, count: int) -> None:
    specs = tables()[-count:]
    frontier = tables_frontier(specs, method.choices)
    rise = TIE * sum(table_value(table).value for table in specs) if method.even else 0.0
    assert (np.diff(frontier.bytes) > 0).all() and (np.diff(frontier.loss) < rise).all()
    for point in np.linspace(0, len(frontier) - 1, 40).astype(int).tolist():
        assert total_bytes(method.group_plans(specs, point)) == frontier.bytes[point]
    assert frontier.loss[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.1, 0.03, 0.01, 0.003, 0.001])
@pytest.mark.parametrize("dim", [16, 64])
def test_budgets_are_used(share: float, dim: int) -> None:
    specs = tables(dim)
    budget = int(share * sum(table.dense_bytes for table in specs))
    plans = allocate(specs, [ec.Auto()] * len(specs), budget, full_plan)
    assert 0.88 * budget <= total_bytes(plans) <= budget


def test_no_restricted_choice_is_expected_to_be_better() -> None:
    specs = tables()
    best = tables_frontier(specs)
    for restricted in (
        Choices(hot=False),
        Choices(share_projection=False),
        Choices(own_rows=True),
        Choices(widths=(1,)),
        Choices(bits=(4,)),
    ):
        other = tables_frontier(specs, restricted)
        points = [best.within(int(size)) for size in other.bytes]
        losses = np.array([best.loss[point] for point in points if point is not None])
        # The search goes by the best steps, which is not the best set: it may be a little worse.
        assert (losses <= 1.25 * other.loss[-len(losses) :] + 1e-9).all()


@pytest.mark.parametrize("share", [0.1, 0.03, 0.02])
def test_even_plans_are_those_of_low_bit(share: float) -> None:
    specs = tables()
    budget = int(share * sum(table.dense_bytes for table in specs))
    even = even_plans([table_value(table) for table in specs], [16] * len(specs), 0.075)
    assert (np.diff(even.bytes) >= 0).all()
    point = even.within(budget)
    assert point is not None
    plans = [auto_plan(*each) for each in zip(specs, even.options(point), strict=True)]
    assert plans == fit_group(ec.LowBit(), specs, budget)
    assert total_bytes(plans) == even.bytes[point]


def test_tables_count_by_what_was_measured() -> None:
    specs = [TableSpec(1000, 16, name) for name in ("user", "item")]
    budget = 4_000
    for worths in ({"user": 0.2, "item": 0.01}, {"user": 0.0, "item": 0.3}):
        method = ec.Auto(worths=worths)
        plans = dict(zip(("user", "item"), fit_group(method, specs, budget), strict=True))
        first, second = sorted(plans, key=lambda name: -worths[name])
        assert plans[first].bytes > 2 * plans[second].bytes
        text = str(method.explain(specs, list(plans.values())))
        assert "by what the model lost without each table" in text and "worth" in text
        assert "by measured worths" in str(method) and hash(method) == hash(replace(method))
    alike = fit_group(ec.Auto(worths={"user": 1, "item": 1}), specs, budget)
    assert [plan.bytes for plan in alike] == [
        plan.bytes for plan in fit_group(ec.Auto(), specs, budget)
    ]


def test_worths_are_checked() -> None:
    with pytest.raises(ValueError, match="worths must be at least 0, got -1 of table 'user'"):
        ec.Auto(worths={"user": -1})
    with pytest.raises(ValueError, match="worths has no table 'item'"):
        fit_group(
            ec.Auto(worths={"user": 1.0}), [TableSpec(9, 4, "user"), TableSpec(9, 4, "item")], 99
        )


def test_rows_are_even_where_no_others_are_expected_to_be_better() -> None:
    alike = [TableSpec(n, 16, f"t{n}", counts=power_law(n, 100_000)) for n in (800, 1000, 1700)]
    dense = sum(table.dense_bytes for table in alike)
    for share, is_even in ((0.1, False), (0.05, True), (0.03, True), (0.003, False)):
        budget = int(share * dense)
        free, low_bit, plans = (
            allocate(alike, [method] * 3, budget, full_plan)
            for method in (ec.Auto(even=False), ec.LowBit(), ec.Auto())
        )
        assert plans == (low_bit if is_even else free)
        assert free != low_bit


def test_bytes_go_where_ids_tell_more() -> None:
    """Two tables of one size; the ids of one hardly occur."""
    flat, rare = torch.full((5000,), 100), torch.zeros(5000, dtype=torch.int64)
    rare[:3] = 100
    specs = [TableSpec(5000, 16, "flat", counts=flat), TableSpec(5000, 16, "rare", counts=rare)]
    plans = allocate(specs, [ec.Auto()] * 2, 20_000, full_plan)
    assert plans[0].bytes > 3 * plans[1].bytes


def test_a_large_table_shares_rows_before_a_small_one_does() -> None:
    specs = [TableSpec(100, 16, "small"), TableSpec(1_000_000, 16, "large")]
    plans = allocate(specs, [ec.Auto()] * 2, 20_000, full_plan)
    assert [
        plan.store("weight").rows >= n for plan, n in zip(plans, (100, 10**6), strict=True)
    ] == [
        True,
        False,
    ]


# ---------------------------------------------------------------------------------- hot ids


def hot_plan(few: bool, dim: int = 64) -> tuple[TableSpec, LookupPlan]:
    """Hot ids have columns beside the others', or are the only ones that have any."""
    table = TableSpec(20_000, dim, "item", counts=power_law(20_000, 2_000_000))
    method = ec.Auto(narrowness=0.9, few=few)
    for point in range(0, len(tables_frontier([table], method.choices)), 5):
        plan = method.plan(table, point)
        names = {store.name for store in plan.stores}
        if "keys" in names and ("weight" not in names) == few:
            return table, plan
    raise AssertionError("no plan has hot ids")


@pytest.mark.parametrize("few", [False, True])
def test_hot_ids_have_columns_of_their_own(few: bool) -> None:
    table, plan = hot_plan(few)
    bag = ec.Embedding.from_plan(plan, ec.Auto())
    assert table.counts is not None
    ec.Auto().fill(table, plan, bag.stores())
    rows, ids = plan.store("hot").rows, torch.arange(table.num_embeddings)
    order = table.counts.argsort(descending=True, stable=True)
    before = bag(ids).detach()
    with torch.no_grad():
        bag.stores()["hot"].mul_(-1)
    changed = (bag(ids) != before).any(1)
    # Where the bucket of an id is full, a less frequent one has the slot that is left.
    assert 0.95 * rows <= changed.sum() <= rows
    assert changed[order[: rows // 2]].float().mean() >= 0.9
    assert not changed[order[2 * rows :]].any()
    assert not few or not before[~changed].any()


def test_the_explanation_says_that_hot_ids_alone_have_rows() -> None:
    table = hot_plan(True)[0]
    method = ec.Auto(narrowness=0.9, few=True)
    plans = allocate([table], [method], 2_000, full_plan)
    assert plans[0].stores[0].name == "keys"
    text = str(method.explain([table], plans))
    assert "of its 20,000 ids, only " in text and " hot ids have rows, " in text


def test_the_bytes_of_hot_rows_are_those_of_their_plan() -> None:
    for ids, count in ((90_000, 1023), (20, 5), (10_000_000, 65_535)):
        rows = HotRows(Head(count, 0.5, ()), 16, 4)
        hot = Hot(count, rows.buckets(ids), 16, 4, 16, 0.5, 0.5)
        option = Option(0, 0, 1, 4, False, rows.bytes(ids), 0.0, 0.0, hot)
        assert auto_plan(TableSpec(ids, 16, "t"), option).bytes == rows.bytes(ids)
        assert rows.bytes(ids) < -(-ids * count.bit_length() // 8) + count * 8 + 64  # codes


def test_hot_ids_need_counts() -> None:
    table = replace(hot_plan(False)[0], counts=None)
    method = ec.Auto(narrowness=0.9)
    for point in range(0, len(tables_frontier([table], method.choices)), 50):
        assert all(store.name != "hot" for store in method.plan(table, point).stores)


@pytest.mark.parametrize("few", [False, True])
def test_a_table_with_hot_ids_trains_and_deploys(few: bool) -> None:
    table, plan = hot_plan(few, 32)
    torch.manual_seed(0)
    bag = ec.EmbeddingBag.from_plan(plan.with_pool("sum"), ec.Auto())
    ec.Auto().fill(table, plan, bag.stores())
    ec.fuse_optimizer(bag, "adagrad", lr=0.1)
    counts = table.counts
    assert counts is not None
    ids, target = counts.float().multinomial(192).view(64, 3), torch.randn(64, 32)
    losses = []
    for _ in range(30):
        loss = (bag(ids) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    expected = bag(ids).detach()
    ec.deploy(bag)
    assert ec.memory(bag).total == plan.bytes
    torch.testing.assert_close(bag(ids), expected)


# -------------------------------------------------------------------------------- explanation


def test_the_explanation_says_where_the_bytes_went(tmp_path: Path) -> None:
    specs = tables()
    method = ec.Auto()
    plans = allocate(specs, [method] * 4, 12_000, full_plan)
    explanation = method.explain(specs, plans)
    assert explanation.bytes == total_bytes(plans) <= 12_000
    assert sum(choice.bytes for choice in explanation.tables) <= explanation.bytes
    assert explanation.tables[0].name == "t20000"
    text = str(explanation)
    for words in ("by known counts", "of the bytes go to t20000: its 20,000 ids have rows", "t40",
                  "Expected loss within the same bytes: ", "1 column everywhere"):  # fmt: skip
        assert words in text
    assert all(lost >= explanation.lost / 1.03 for _, lost in explanation.alternatives)
    assert str(method.explain(specs, plans)) == text
    pytest.importorskip("matplotlib")
    assert explanation.plot(tmp_path / "plan.png").stat().st_size > 10_000


def test_the_explanation_says_what_was_not_known() -> None:
    specs = [replace(table, counts=None) for table in tables()]
    plans = allocate(specs, [ec.Auto()] * 4, 12_000, full_plan)
    assert "by an assumed power law" in str(ec.Auto().explain(specs, plans))


def test_fewer_bits_lose_more() -> None:
    losses = [QUANTIZATION_LOSS[bits] for bits in sorted(QUANTIZATION_LOSS)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0


@pytest.mark.parametrize("setting", [{"narrowness": -1.0}, {"chunks": 0}])
def test_settings_are_checked(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        ec.Auto(**setting)  # type: ignore[arg-type]


def test_a_trained_table_starts_shared_rows_from_their_means() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"item": torch.nn.Embedding(20_000, 16)})
    with torch.no_grad():  # a few vectors, which rows can approximate
        model["item"].weight.copy_(torch.randn(4, 16)[torch.randint(0, 4, (20_000,))])
    counts = power_law(20_000, 10**6)
    report = ec.compress(
        model,
        method=ec.Auto(narrowness=3.0),
        budget="0.2%",
        keep_weights=True,
        counts={"item": counts},
    )
    item = model["item"]
    assert isinstance(item, ec.Embedding)
    weight = item.plan.store("weight")
    assert weight.rows < 20_000 and weight.width > 1
    assert report.tables[0].error is not None and report.tables[0].error < 1
