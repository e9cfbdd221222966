"""Methods that find sparse rows: their rules, their phases, and what is left of the tables."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import embcompress as ec
from embcompress.budget import fit_plan, smallest_plan
from embcompress.engine import Bags, lookup
from embcompress.engine.reference import lookup_reference
from embcompress.engine.rows import unpack_bits
from embcompress.layouts.packing import unpack_codes
from embcompress.layouts.sparse import mask_of_largest, read_mask
from embcompress.methods import TableSpec
from embcompress.methods.autosrh import GATES, GROUPS, gate_scores
from embcompress.methods.cerp import rows_of
from embcompress.plan import Digit, LookupPlan, Probe, Store
from embcompress.procedures.soft_thresholds import GRANULARITIES
from tests.phased_method import Model, assert_same, batch, new_optimizer, run, train

METHODS: dict[str, ec.Method] = {
    "deeplight": ec.DeepLight(interval=2),
    "pep": ec.PEP(interval=2, decay=0.1),
    "autosrh": ec.AutoSRH(groups=5, rate=0.1),
    "cerp": ec.CERP(interval=2, decay=0.1),
}


def in_phase(method: ec.Method, number: int, steps: int) -> tuple[Model, ec.TrainingProcedure]:
    """A model that made so many steps of each phase before that number, and of that one."""
    model = Model(method)
    procedure = ec.TrainingProcedure(model)
    for _ in range(number + 1):
        assert procedure.begin_phase() is not None
        optimizer = new_optimizer(model, True)
        procedure.attach(optimizer)
        train(model, optimizer, procedure, range(steps))
    return model, procedure


def kept(table: ec.EmbeddingBag, name: str = "weight") -> Tensor:
    return read_mask(table.stores()[f"{name}_index"], table.plan.store(name))


# -------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("resume_at", [(0, 3), (1, 3)])
def test_training_goes_on_where_it_stopped(
    name: str, fused: bool, resume_at: tuple[int, int]
) -> None:
    whole, procedure, _ = run(Model(METHODS[name]), fused)
    again, other, _ = run(Model(METHODS[name]), fused, resume_at=resume_at)
    assert_same(whole.state_dict(), again.state_dict())
    assert_same(procedure.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_what_is_deployed_keeps_to_the_budget(name: str) -> None:
    model, _, _ = run(Model(METHODS[name]), steps=8)
    built = Model(METHODS[name])
    for number in (0, 1):
        assert model.table(number).plan == built.table(number).plan
    ids, _ = batch(0, model)
    expected = model(ids).detach()
    sizes = [store.bytes for number in (0, 1) for store in model.table(number).plan.stores]
    ec.deploy(model)
    report = ec.memory(model)
    assert report.total == sum(sizes) <= 0.4 * report.dense and report.training == 0
    torch.testing.assert_close(model(ids), expected)
    twin = Model(METHODS[name])
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(ids), model(ids))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", ["3%", "10%", "30%", "70%"])
@pytest.mark.parametrize("shape", [(20_000, 16), (3000, 33)])
def test_budgets_are_used_and_kept(name: str, budget: str, shape: tuple[int, int]) -> None:
    table = TableSpec(*shape)
    limit = int(float(budget[:-1]) * table.dense_bytes / 100)
    plan = fit_plan(METHODS[name], table, limit)
    assert 0.98 * limit <= plan.bytes <= limit
    with pytest.raises(ec.BudgetError, match="smallest"):
        fit_plan(METHODS[name], table, smallest_plan(METHODS[name], table).bytes - 1)


@pytest.mark.parametrize("name", METHODS)
def test_bytes_rise_with_the_size(name: str) -> None:
    table = TableSpec(150, 7)
    sizes = [METHODS[name].plan(table, size).bytes for size in METHODS[name].sizes(table)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("name", METHODS)
def test_a_table_on_meta_takes_no_time(name: str) -> None:
    started = time.perf_counter()
    table = ec.Embedding(10**9, 16, method=name, budget="10%", device="meta")
    assert table.weight.is_meta and time.perf_counter() - started < 5


@pytest.mark.parametrize("name", ["deeplight", "pep", "autosrh"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_fit_keeps_the_largest_numbers(name: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 8, generator=generator)
    counts = torch.randint(0, 50, (200,), generator=generator) if weighted else None
    module = ec.Embedding.from_pretrained(weight, method=name, budget="30%", counts=counts)
    shares = torch.ones(200) if counts is None else counts + 0.1
    loss = weight.square() * shares[:, None]
    bits = read_mask(module.weight_index, module.plan.store("weight"))
    assert loss[bits].min() >= loss[~bits].max()
    assert torch.equal(module.to_dense(), weight * bits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ec.DeepLight(damping=0), "damping positive, got 2, 10, 0"),
        (lambda: ec.PEP(granularity="block"), "granularity must be one of table, column"),
        (lambda: ec.PEP(decay=1.0), r"decay in \[0, 1\)"),
        (lambda: ec.AutoSRH(groups=0), "groups and epochs must be at least 1"),
        (lambda: ec.CERP(density=0.0), r"density must be in \(0, 1\], got 0.0"),
        (lambda: ec.CERP(granularity="block"), "granularity must be one of table, column"),
        (lambda: ec.CERP(start=0), "start positive"),
    ],
)
def test_settings_are_checked(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ----------------------------------------------------------------------------------- deeplight


def test_deeplight_sets_the_smallest_numbers_to_zero() -> None:
    method = ec.DeepLight(interval=4, damping=5)
    model, procedure = in_phase(method, 0, 3)
    table = model.table(0)
    assert kept(table).all()
    before = table.weight.detach().clone()
    (managed, *_) = procedure.tables.values()
    assert [managed.procedure.is_due(t) for t in (1, 4, 6, 8)] == [False, True, False, True]
    with torch.no_grad():
        managed.procedure.step(managed, 100)
    stored = table.plan.store("weight").sparsity.stored
    pruned = int((1 - 0.99 ** (100 / 5)) * (before.numel() - stored))
    expected = before.flatten().clone()
    expected[before.abs().flatten().argsort()[:pruned]] = 0
    assert 0 < pruned < before.numel() - stored
    assert torch.equal(table.weight.detach().flatten(), expected)


def test_deeplight_trains_on_with_the_largest_numbers() -> None:
    model, procedure = in_phase(ec.DeepLight(interval=2), 0, 5)
    weights = [model.table(number).weight.detach().clone() for number in (0, 1)]
    layer = model.layer.weight.detach().clone()
    with pytest.raises(ValueError, match="keeps 480 numbers"):
        ec.deploy(model)
    procedure.begin_phase()
    assert procedure.tables == {} and torch.equal(model.layer.weight, layer)
    for number, weight in enumerate(weights):
        table = model.table(number)
        stored = table.plan.store("weight").sparsity.stored
        bits = read_mask(mask_of_largest(weight.abs(), stored), table.plan.store("weight"))
        assert torch.equal(table.weight.detach(), weight * bits)
        assert torch.equal(kept(table), bits) and int(bits.sum()) == stored


# --------------------------------------------------------------------------------------- pep


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_pep_reads_and_learns_by_its_formula(granularity: str) -> None:
    model, _ = in_phase(ec.PEP(granularity=granularity, start=0.5), 0, 2)
    table = model.table(0)
    e = table.weight.detach().double().requires_grad_()
    s = table.weight_threshold.detach().double().requires_grad_()
    shape = {"table": (1, 1), "column": (1, 8), "row": (60, 1), "element": (60, 8)}
    assert s.shape == shape[granularity]
    v = e.sign() * (e.abs() - 1 / (1 + (-s).exp())).clamp(min=0)
    assert 0 < int((v == 0).sum()) < v.numel()
    ids = torch.tensor([3, 7, 7, 59])
    plan = table.plan.with_pool("none").with_dtypes(
        {"weight": "float64", "weight_threshold": "float64"}
    )

    def run_plan(e: Tensor, s: Tensor) -> Tensor:
        return lookup(plan, {"weight": e, "weight_threshold": s}, Bags(ids, ids))

    torch.testing.assert_close(run_plan(e, s), v[ids])
    assert gradcheck(run_plan, (e, s))


def test_pep_starts_at_a_share_of_the_deviation_and_rises() -> None:
    method = ec.PEP(start=0.25, decay=0.01, interval=1000)
    model = Model(method)
    procedure = ec.TrainingProcedure(model)
    procedure.begin_phase()
    table = model.table(0)
    first = 0.25 * float(table.weight.detach().std(correction=0))
    torch.testing.assert_close(table.weight_threshold.sigmoid(), torch.full((1, 8), first))
    before = table.weight_threshold.detach().clone()
    procedure.step()
    torch.testing.assert_close(table.weight_threshold.detach(), 0.99 * before)


def test_pep_keeps_what_is_left_when_there_is_room_for_it() -> None:
    model, procedure = in_phase(ec.PEP(interval=1, decay=0.2), 0, 1)
    table, managed = model.table(0), procedure.tables["embeddings.embedding_bags.t0"]
    stored = managed.built.store("weight").sparsity.stored
    step = 1
    while not bool(managed.tensor("weight_reached")):
        step += 1
        procedure.step()
        assert step < 100
    margin = table.weight.detach().abs() - table.weight_threshold.detach().sigmoid()
    assert int((margin > 0).sum()) <= stored
    taken = table.weight_threshold.detach().clone()
    with torch.no_grad():
        table.weight.normal_()  # what is learned afterwards changes nothing
    procedure.step()
    assert torch.equal(table.weight_threshold.detach(), taken)
    procedure.begin_phase()
    bits = kept(table)
    assert int(bits.sum()) == stored
    assert margin[bits].min() >= margin[~bits].max()


def test_pep_trains_again_from_the_initial_weights() -> None:
    model = Model(ec.PEP())
    procedure = ec.TrainingProcedure(model)
    procedure.begin_phase()
    initial, layer = model.table(0).weight.detach().clone(), model.layer.weight.detach().clone()
    optimizer = new_optimizer(model, False)
    train(model, optimizer, procedure, range(4))
    assert not torch.equal(model.table(0).weight.detach(), initial)
    procedure.begin_phase()
    table = model.table(0)
    assert torch.equal(table.weight.detach(), initial * kept(table))
    assert torch.equal(model.layer.weight.detach(), layer)


# ------------------------------------------------------------------------------------- autosrh


def test_autosrh_gates_learn_by_the_chain_rule() -> None:
    model = Model(ec.AutoSRH(groups=3, rate=0.1, l1=0.5))
    procedure = ec.TrainingProcedure(model)
    procedure.begin_phase()
    table, managed = model.table(0), procedure.tables["embeddings.embedding_bags.t0"]
    assert torch.equal(table.gates.detach(), torch.ones(3, 8))
    assert not table.gates.requires_grad
    ids = torch.tensor([[3, 3], [7, 59], [20, 21]])
    gradient = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    table.train()
    with procedure.validating():
        table(ids).backward(gradient)
    leaves = {n: t.detach().clone() for n, t in table.stores().items()}
    leaves[GATES].requires_grad_()
    bags = Bags(ids.flatten(), torch.tensor([0, 2, 4, 6]))
    lookup_reference(table.plan, leaves, bags).backward(gradient)
    wanted = leaves[GATES].grad
    torch.testing.assert_close(managed.tensor("gradient"), wanted)
    procedure.step()
    moved = 1 - 0.1 * wanted / (wanted.abs() + 1e-10)
    expected = moved.sign() * (moved.abs() - 0.1 * 0.5).clamp(min=0)
    torch.testing.assert_close(table.gates.detach(), expected)
    assert not managed.tensor("gradient").any()


@pytest.mark.parametrize("counted", [False, True])
def test_autosrh_groups_are_of_as_many_ids_by_count(counted: bool) -> None:
    counts = torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    table = ec.EmbeddingBag(
        60, 8, method=ec.AutoSRH(groups=7), budget="40%", counts=counts if counted else None
    )
    ec.TrainingProcedure(table).begin_phase()
    groups = unpack_codes(table.get_buffer(GROUPS), 0, 60, table.plan.store(GROUPS).bits)
    sizes = torch.bincount(groups)
    assert len(sizes) == 7 and int(sizes.max() - sizes.min()) <= 1
    order = counts.double() - torch.arange(60) / 60 if counted else -torch.arange(60).double()
    for group in range(6):
        assert order[groups == group].min() > order[groups == group + 1].max()


def test_autosrh_keeps_the_numbers_under_the_largest_gates() -> None:
    model, procedure = in_phase(ec.AutoSRH(groups=4, rate=0.2), 0, 5)
    table = model.table(0)
    stores = {name: tensor.detach().clone() for name, tensor in table.stores().items()}
    bits = table.plan.store(GROUPS).bits
    groups = unpack_bits(stores[GROUPS], torch.arange(60), bits)
    gate = stores[GATES][groups]
    procedure.begin_phase()
    gated, mask = stores["weight"] * gate, kept(model.table(0))
    assert torch.equal(model.table(0).weight.detach(), gated * mask)
    lowest = gate.abs()[mask].min()
    assert lowest >= gate.abs()[~mask].max()
    last = (gate.abs() == lowest) & (groups[:, None] >= 0)
    if (last & mask).any() and (last & ~mask).any():
        assert gated[last & mask].abs().min() >= gated[last & ~mask].abs().max()


def test_gate_scores_go_by_gates_first() -> None:
    gates = torch.tensor([[0.5, -2.0], [0.0, 1.0]])
    gated = torch.tensor([[9.0, 0.1], [0.2, 0.3], [8.0, 7.0]])
    scores = gate_scores(gated, gates, torch.tensor([0, 0, 1]))
    order = scores.flatten().argsort(descending=True).tolist()
    assert order == [3, 1, 5, 0, 2, 4]


# ---------------------------------------------------------------------------------------- cerp


def test_cerp_adds_a_remainders_and_a_quotients_row() -> None:
    table = ec.Embedding(500, 6, method="cerp", budget="20%")
    remainder, quotient = table.plan.probes
    b, store = quotient.offset, table.plan.store("weight")
    span = -(-500 // b)
    assert remainder.address == Digit(1, b)
    assert store.rows == b + -(-500 // span) <= 2 * b
    larger = rows_of(500, b + 1)
    assert store.rows * 6 // 2 <= store.sparsity.stored < larger * 6 // 2
    bits = read_mask(table.get_buffer("weight_index"), store)
    assert int(bits.sum()) == store.sparsity.stored
    rows, ids = table.weight * bits, torch.arange(500)
    torch.testing.assert_close(table(ids), rows[ids % b] + rows[b + ids // span])
    assert len({*zip((ids % b).tolist(), (ids // span).tolist(), strict=True)}) == 500


@pytest.mark.parametrize("ids", [1, 2, 3, 7, 50, 997])
def test_no_two_ids_of_cerp_have_both_rows_in_common(ids: int) -> None:
    method, table = ec.CERP(), TableSpec(ids, 2)
    for size in method.sizes(table)[:: max(1, ids // 20)]:
        rows = [p.offset + torch.arange(ids) // p.address.divisor % p.address.radix
                for p in method.plan(table, size).probes]  # fmt: skip
        assert len(torch.stack(rows, 1).unique(dim=0)) == ids


def test_cerp_reads_both_tables_through_thresholds() -> None:
    model, _ = in_phase(ec.CERP(start=0.5), 0, 2)
    table = model.table(0)
    e, s = table.weight.detach(), table.weight_threshold.detach()
    rows = e.sign() * (e.abs() - s.sigmoid()).clamp(min=0)
    assert (rows == 0).any() and s.unique().numel() > 1
    ids, b = torch.arange(60), table.plan.probes[1].offset
    expected = rows[ids % b] + rows[b + ids // -(-60 // b)]
    torch.testing.assert_close(table(ids[:, None]), expected)


def test_cerp_trains_again_from_the_initial_weights() -> None:
    model = Model(ec.CERP(interval=1, decay=0.3))
    procedure = ec.TrainingProcedure(model)
    procedure.begin_phase()
    initial = model.table(0).weight.detach().clone()
    train(model, new_optimizer(model, False), procedure, range(6))
    mask = next(iter(procedure.tables.values())).tensor("weight_mask").clone()
    procedure.begin_phase()
    table = model.table(0)
    assert torch.equal(table.weight_index, mask)
    assert torch.equal(table.weight.detach(), initial * kept(table))


def test_a_fit_of_cerp_keeps_the_largest_numbers_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20 + 20, 4, generator=generator)
    ids = torch.arange(200)
    weight = rows[ids % 20] + rows[20 + ids // 10]
    fitted = {}
    for density in (1.0, 0.5):
        method, table = ec.CERP(density=density), TableSpec(200, 4)
        size = next(s for s in method.sizes(table) if method.buckets(table, s) == 20)
        fitted[density] = ec.Embedding.from_pretrained(
            weight, method=method, budget=method.plan(table, size).bytes
        )
    torch.testing.assert_close(fitted[1.0].to_dense(), weight, rtol=1e-3, atol=1e-3)
    half = fitted[0.5]
    bits = read_mask(half.weight_index, half.plan.store("weight"))
    magnitudes = fitted[1.0].weight.detach().abs()
    assert magnitudes[bits].min() >= magnitudes[~bits].max()


# ------------------------------------------------------------------------------ plan vocabulary


def test_a_threshold_starts_as_none() -> None:
    plan = LookupPlan(
        9,
        4,
        (Store("weight", 9, 4, threshold="t"), Store("t", 1, 1)),
        (Probe("weight", Digit(1, 9)),),
    )
    module = ec.Embedding.from_plan(plan)
    assert module.t.detach().item() == -15
    assert math.isclose(float(module.to_dense().std()), 1, rel_tol=0.5)
