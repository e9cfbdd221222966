"""Mixed precision: slots, the dial, what the search measures, and the choice by a budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.budget import fit_plan, smallest_plan
from embcompress.engine import Bags, lookup
from embcompress.engine.reference import lookup_reference
from embcompress.engine.rows import address_rows
from embcompress.layouts.precision import (
    PRECISIONS,
    PrecisionLayout,
    bucket_ranges,
    rows_name,
    ways_of,
)
from embcompress.methods import TableSpec
from embcompress.plan import LookupPlan, Slot
from embcompress.procedures.precision_search import ERRORS, SearchedTable, choose_plans, group_sizes
from tests.phased_method import Model, assert_same, batch, loss, new_optimizer, run, train


def counted(ids: int) -> Tensor:
    """Counts that fall with a shuffled rank."""
    ranks = torch.randperm(ids, generator=torch.Generator().manual_seed(1))
    return (1000 / (1 + ranks)).long()


def read_precisions(plan: LookupPlan, stores: dict[str, Tensor]) -> Tensor:
    """(num_embeddings,) bits of the row of most bits that every id reads."""
    ids, bits = torch.arange(plan.num_embeddings), torch.zeros(plan.num_embeddings).long()
    for probe in reversed(plan.probes):
        _, present = address_rows(probe.address, ids, plan, stores)
        bits[slice(None) if present is None else present] = plan.store(probe.store).bits
    return bits


# -------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("ids", [1, 2, 15, 16, 17, 129, 1000, 2**40])
def test_numbers_of_buckets_go_by_the_bits_of_their_keys(ids: int) -> None:
    ranges = bucket_ranges(ids)
    assert ranges[-1][-1] == max(1, ids // ways_of(ids))
    for one, other in itertools.pairwise(ranges):
        assert one.stop == other.start
    bits = [{(-(-ids // count)).bit_length() for count in (r[0], r[-1])} for r in ranges]
    assert all(len(each) == 1 for each in bits)
    firsts = [each.pop() for each in bits]
    assert all(one > other for one, other in itertools.pairwise(firsts))
    assert (-(-ids // ranges[0][0])).bit_length() <= 32


@pytest.mark.parametrize("base", [0, 1])
def test_every_slot_is_the_row_of_one_id(base: int) -> None:
    layout = PrecisionLayout(1000, 4, base, ((8, 5), (4, 11)))
    plan = layout.plan("float32")
    assert PrecisionLayout.of(plan) == layout
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    keys = layout.keys(ids)
    rank = torch.empty(1000).long().index_copy_(0, ids, torch.arange(1000))
    everyone, seen = torch.arange(1000), []
    for probe in plan.probes[:2]:
        rows, present = address_rows(probe.address, everyone, plan, keys)
        assert len(rows[present].unique()) == int(present.sum())
        assert int(present.sum()) >= 0.9 * probe.address.size
        seen.append(present)
    assert not (seen[0] & seen[1]).any()
    # The first ids have the highest precision, but for those whose bucket was full.
    assert float(seen[0][rank < 20].float().mean()) > 0.8
    assert rank[seen[0]].max() < 2 * 40
    # What is full gives way to the next precision, not to none.
    assert not (~seen[0] & ~seen[1])[rank < 60].any()


def test_both_engines_read_the_same_vectors() -> None:
    torch.manual_seed(0)
    layout = PrecisionLayout(300, 6, 1, ((8, 3), (4, 4), (2, 5)))
    table = ec.EmbeddingBag.from_plan(layout.plan("float32").with_pool("sum"))
    for name, keys in layout.keys(torch.randperm(300)).items():
        table.get_buffer(name).copy_(keys)
    ids, offsets = torch.randint(0, 300, (50,)), torch.tensor([0, 7, 7, 30, 50])
    for _ in range(2):  # latents, then packed
        bags = Bags(ids, offsets)
        expected = lookup_reference(table.plan, table.stores(), bags)
        torch.testing.assert_close(lookup(table.plan, table.stores(), bags), expected)
        ec.deploy(table)


# ---------------------------------------------------------------------------------------- dial


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (40, 2), (150, 7), (700, 1)])
def test_bytes_rise_with_the_size(shape: tuple[int, int]) -> None:
    table, method = TableSpec(*shape), ec.MPE()
    sizes = [method.plan(table, size).bytes for size in method.sizes(table)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("budget", [0.005, 0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("shape", [(20_000, 16), (3000, 33)])
def test_budgets_are_used_and_kept(budget: float, shape: tuple[int, int]) -> None:
    table = TableSpec(*shape)
    limit = int(budget * table.dense_bytes)
    assert 0.9 * limit <= fit_plan(ec.MPE(), table, limit).bytes <= limit
    with pytest.raises(ec.BudgetError, match="smallest"):
        fit_plan(ec.MPE(), table, smallest_plan(ec.MPE(), table).bytes - 1)


def test_the_most_frequent_ids_have_more_bits() -> None:
    counts = counted(2000)
    for budget, pair in (("2%", (0, 4)), ("6%", (1, 4)), ("9%", (2, 4)), ("20%", (4, 8))):
        table = ec.Embedding(2000, 8, method="mpe", budget=budget, counts=counts)
        bits = read_precisions(table.plan, table.stores())
        assert {*bits.tolist()} == {*pair}
        assert counts[bits == pair[1]].float().mean() > 2 * counts[bits == pair[0]].float().mean()
        assert bits[counts.argmax()] == pair[1]


# ---------------------------------------------------------------------------------------- fit


def test_a_fit_quantizes_what_the_rows_of_all_leave_over() -> None:
    weight = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    counts, errors = counted(2000), []
    for budget in ("2%", "6%", "9%", "20%"):
        table = ec.Embedding.from_pretrained(weight, method="mpe", budget=budget, counts=counts)
        bits = read_precisions(table.plan, table.stores())
        wrong = (table.to_dense() - weight).square().mean(1)
        by_bits = [float(wrong[bits == b].mean()) for b in sorted({*bits.tolist()})]
        assert by_bits == sorted(by_bits, reverse=True) and by_bits[-1] < 0.05
        errors.append(float(wrong.mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02


def test_a_fit_needs_finite_numbers() -> None:
    weight = torch.ones(40, 4)
    weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match="row 3, column 2"):
        ec.Embedding.from_pretrained(weight, method="mpe", budget="20%")


# ------------------------------------------------------------------------------------- search


def test_groups_are_halves() -> None:
    def sizes(ids: int, groups: int) -> list[int]:
        return group_sizes(TableSpec(ids, 1, counts=torch.ones(ids)), groups)

    assert sizes(1000, 4) == [125, 125, 250, 500]
    assert sizes(5, 16) == [1, 1, 3] and sizes(1, 16) == [1]
    for ids in range(1, 70):
        found = sizes(ids, 5)
        assert sum(found) == ids and min(found) >= 1 and len(found) <= 5
    assert group_sizes(TableSpec(1000, 1), 4) == [1000]


@pytest.mark.parametrize("bits", PRECISIONS[1:])
def test_errors_are_those_of_normal_numbers(bits: int) -> None:
    torch.manual_seed(0)
    plan = PrecisionLayout(100_000, 1, bits, ()).plan("float32")
    table = ec.Embedding.from_plan(plan)
    latents = table.get_parameter(rows_name(bits)).detach()
    error = float((table.to_dense().detach() - latents).square().mean())
    assert error == pytest.approx(ERRORS[bits], rel=0.05)


@pytest.mark.parametrize("has_counts", [False, True])
def test_sensitivities_are_sums_over_what_is_looked_up(has_counts: bool) -> None:
    torch.manual_seed(0)
    counts = counted(60) if has_counts else None
    table = ec.EmbeddingBag(60, 8, method=ec.MPE(groups=3), budget="20%", counts=counts, mode="sum")
    procedure = ec.TrainingProcedure(table)
    assert procedure.begin_phase().name == "search" and table.plan.is_dense
    (managed,) = procedure.tables.values()
    groups = managed.tensor("groups").long()
    assert torch.bincount(groups).tolist() == ([15, 15, 30] if has_counts else [60])
    if counts is not None:
        for group in (0, 1):
            assert counts[groups == group].min() >= counts[groups == group + 1].max()
    expected = torch.zeros(len(groups.unique()), dtype=torch.float64)
    for _ in range(2):
        ids, target = torch.randint(0, 60, (12, 3)), torch.randn(12, 8)
        (table(ids) - target).square().mean().backward()
        rows = table.weight.detach()
        gradient = 2 * (rows[ids].sum(1) - target) / target.numel()
        for bag, own in zip(ids, gradient, strict=True):
            for x in bag:
                expected[groups[x]] += (own * rows[x]).square().sum()
        procedure.step()
    torch.testing.assert_close(managed.tensor("sensitivity"), expected, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------- choice


def searched(ids: int, width: int, sensitivity: list[float]) -> SearchedTable:
    spec = TableSpec(ids, width, counts=torch.ones(ids))
    sizes = group_sizes(spec, len(sensitivity))
    return SearchedTable(spec, sizes, torch.tensor(sensitivity, dtype=torch.float64))


def error_of(table: SearchedTable, bits: tuple[int, ...]) -> float:
    return sum(float(s) * ERRORS[b] for s, b in zip(table.sensitivity, bits, strict=True))


def test_groups_that_matter_more_an_id_have_more_bits() -> None:
    table = searched(8000, 16, [8.0, 4.0, 0.1, 0.01])
    for budget in (2000, 8000, 20_000, 60_000):
        ((plan, segments),) = choose_plans([table], budget)
        assert sum(ids for ids, _ in segments) == 8000
        assert 0.9 * budget <= plan.bytes <= budget
        bits = [b for ids, b in segments if ids]
        assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("budget", [4000, 12_000, 30_000, 70_000])
def test_the_choice_is_near_the_best_of_all(budget: int) -> None:
    table = searched(8000, 16, [2.0, 5.0, 0.3, 1.0])

    def size_of(bits: tuple[int, ...]) -> int:
        segments = list(zip(table.sizes, bits, strict=True))
        return table.layout(min(bits), segments).plan("float32").bytes

    choices = itertools.product(PRECISIONS, repeat=4)
    best = min(error_of(table, bits) for bits in choices if size_of(bits) <= budget)
    ((plan, segments),) = choose_plans([table], budget)
    base = PrecisionLayout.of(plan).base
    shares = [
        sum(ids * ERRORS[max(bits, base)] for ids, bits in segments[2 * g : 2 * g + 2]) / size
        for g, size in enumerate(table.sizes)
    ]
    found = float(table.sensitivity @ torch.tensor(shares, dtype=torch.float64))
    assert found <= 1.1 * best + 1e-4


def test_tables_share_the_budget_by_one_price() -> None:
    much, little = searched(8000, 16, [9.0] * 3), searched(8000, 16, [0.1] * 3)
    (large, _), (small, _) = choose_plans([much, little], 40_000)
    sizes = [large.bytes, small.bytes]
    assert 36_000 <= sum(sizes) <= 40_000 and sizes[0] > 2 * sizes[1]


def test_rows_that_most_ids_have_need_no_slots() -> None:
    even, steep = searched(8000, 16, [1.0, 1.0]), searched(8000, 16, [1.0, 0.0, 0.0])
    found = {price: even.precisions(10.0**price) for price in range(-10, 1)}
    assert all(base == min(bits) for base, bits in found.values())
    assert {base for base, _ in found.values()} == {0, 2, 4, 8}
    assert steep.precisions(1e-6)[0] == 0 and steep.precisions(1e-6)[1][1:] == [0, 0]
    assert even.layout(1, [(8000, 1)]) == PrecisionLayout(8000, 16, 1, ())
    assert even.layout(0, [(8000, 0)]) == PrecisionLayout(8000, 16, 0, ((1, 1),))


@pytest.mark.parametrize("weight", [0.0, 1.0, 1e9])
def test_all_budgets_are_met(weight: float) -> None:
    for ids in (1, 5, 40, 1000):
        spec = TableSpec(ids, 4, counts=torch.ones(ids))
        sizes = group_sizes(spec, 16)
        table = SearchedTable(spec, sizes, weight * torch.rand(len(sizes)).double())
        for size in ec.MPE().sizes(spec)[:: max(1, ids // 10)]:
            budget = ec.MPE().plan(spec, size).bytes
            ((plan, _),) = choose_plans([table], budget)
            assert plan.bytes <= budget


# ------------------------------------------------------------------------------------- phases

METHOD = ec.MPE()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("resume_at", [(0, 3), (1, 3)])
def test_training_goes_on_where_it_stopped(fused: bool, resume_at: tuple[int, int]) -> None:
    whole, procedure, _ = run(Model(METHOD, budget="20%"), fused)
    again, other, _ = run(Model(METHOD, budget="20%"), fused, resume_at=resume_at)
    assert_same(whole.state_dict(), again.state_dict())
    assert_same(procedure.state_dict(), other.state_dict())


def test_what_is_deployed_keeps_to_the_budget() -> None:
    model, _, _ = run(Model(METHOD, budget="20%"), steps=8)
    built = Model(METHOD, budget="20%")
    ids, _ = batch(0, model)
    expected = model(ids).detach()
    ec.deploy(model)
    report = ec.memory(model)
    allowed = sum(built.table(number).plan.bytes for number in (0, 1))
    assert 0.7 * allowed <= report.total <= allowed and report.training == 0
    torch.testing.assert_close(model(ids), expected)
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(built(ids), expected)


def test_a_table_stays_full_where_that_takes_fewer_bytes() -> None:
    model, _, _ = run(Model(METHOD, rows=(1, 2, 30), budget="60%"))
    plans = [model.table(number).plan for number in (0, 1, 2)]
    assert plans[0].is_dense and not plans[2].is_dense
    assert sum(plan.bytes for plan in plans) <= 0.6 * 33 * 8 * 4


def test_ids_that_matter_more_have_more_bits_in_the_end() -> None:
    counts = counted(400)
    torch.manual_seed(0)
    table = ec.EmbeddingBag(400, 8, method=ec.MPE(), budget="6%", counts=counts, mode="sum")
    procedure = ec.TrainingProcedure(table)
    target = torch.randn(400, 8)
    procedure.begin_phase()
    optimizer = new_optimizer(table, False)
    procedure.attach(optimizer)
    chances = counts.float()
    for _ in range(60):
        ids = torch.multinomial(chances, 128, replacement=True)
        optimizer.zero_grad()
        (table(ids[:, None]) - target[ids]).square().mean().backward()
        optimizer.step()
        procedure.step()
    assert ec.memory(table).training > 0
    allowed = procedure.tables[next(iter(procedure.tables))].built.bytes
    procedure.begin_phase()
    assert table.plan.bytes <= allowed
    bits = read_precisions(table.plan, table.stores())
    hot = counts.argsort(descending=True)
    assert bits[hot[:20]].float().mean() > bits[hot[200:]].float().mean() + 1
    for probe in table.plan.probes:
        if isinstance(probe.address, Slot):
            assert (table.plan.store(probe.store).bits == bits).any()


@pytest.mark.parametrize("settings", [{"groups": 0}, {"groups": 65}, {"epochs": 0}])
def test_settings_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"groups must be in \[1, 64\] and epochs at least 1"):
        ec.MPE(**settings)


def test_a_step_of_training_learns() -> None:
    model = Model(METHOD, budget="20%")
    procedure = ec.TrainingProcedure(model)
    while procedure.begin_phase() is not None:
        optimizer = new_optimizer(model, True)
        procedure.attach(optimizer)
        before = float(loss(model, 0).detach())
        train(model, optimizer, procedure, range(12))
        assert float(loss(model, 0).detach()) < before
