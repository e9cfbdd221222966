"""CAFE: who owns rows in training, what a promoted row starts as, and going on from a state."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.layouts.packing import absent_code, unpack_codes
from embcompress.layouts.slots import SlotLayout
from embcompress.procedures.hot_sketch import EMPTY

ROWS, WIDTH = 600, 4


def new_table(rows: int = ROWS, **settings: object) -> ec.Embedding:
    torch.manual_seed(0)
    return ec.Embedding(rows, WIDTH, method=ec.Cafe(**settings), budget=2000, name="t")


def some_ids(seed: int, count: int = 64, rows: int = ROWS) -> torch.Tensor:
    """A few ids most of the time, in a range that moves on with the seed."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(count, generator=generator) ** 4 * rows).long() + 7 * seed) % rows


def keys_of(table: ec.Embedding) -> torch.Tensor:
    """(slots,) the ids that own rows; -1 for empty slots."""
    layout = SlotLayout.of(table.plan)
    keys = unpack_codes(table.keys, 0, layout.hot, layout.bits)
    return torch.where(keys == absent_code(layout.bits), EMPTY, keys)


def test_at_the_start_nobody_owns_a_row_or_the_most_frequent_do() -> None:
    assert (keys_of(new_table()) == EMPTY).all()
    counts = torch.arange(ROWS)
    table = ec.Embedding(ROWS, WIDTH, method="cafe", budget=2000, counts=counts)
    owners = keys_of(table)
    assert (owners != EMPTY).float().mean() > 0.9
    assert owners[owners != EMPTY].float().mean() > counts.float().mean()
    procedure = ec.TrainingProcedure(table)
    sketch, layout = procedure.tables[""].tensor("sketch_ids"), SlotLayout.of(table.plan)
    assert torch.equal(sketch[:, : layout.ways].flatten(), owners)
    assert (sketch[:, layout.ways :] == EMPTY).all()


def test_scores_are_decaying_sums_of_gradient_norms() -> None:
    table = new_table(rows=40, interval=2, decay=0.5, watched=40)  # every id has a slot
    procedure = ec.TrainingProcedure(table)
    expected = torch.zeros(40, dtype=torch.float64)
    for step in range(6):
        ids, target = some_ids(step, rows=40), torch.randn(64, WIDTH)
        (table(ids) * target).sum().backward()
        procedure.step()
        expected.index_add_(0, ids, target.double().norm(dim=1))
        if step % 2:
            expected *= 0.5
    managed = procedure.tables[""]
    ids, scores = managed.tensor("sketch_ids"), managed.tensor("sketch_scores")
    assert set(ids[ids != EMPTY].tolist()) == set(expected.nonzero().flatten().tolist())
    held = ids != EMPTY
    torch.testing.assert_close(scores[held].double(), expected[ids[held]], rtol=1e-5, atol=1e-6)


def test_frequencies_are_counted() -> None:
    table = new_table(rows=40, interval=100, watched=40, importance="frequency")
    procedure = ec.TrainingProcedure(table)
    table(torch.tensor([3, 5, 3, 3]))
    managed = procedure.tables[""]
    ids, scores = managed.tensor("sketch_ids"), managed.tensor("sketch_scores")
    assert scores[ids == 3].tolist() == [3.0] and scores[ids == 5].tolist() == [1.0]


def test_hot_ids_come_to_own_rows_and_lose_them() -> None:
    table = new_table(interval=1, decay=0.9)
    procedure = ec.TrainingProcedure(table)

    def see(ids: list[int], steps: int) -> set[int]:
        for step in range(steps):
            batch = torch.cat([torch.tensor(ids).repeat(5), some_ids(step, 20)])
            (table(batch) * torch.ones(WIDTH)).sum().backward()
            procedure.step()
        return set(keys_of(table).tolist())

    assert {11, 222, 333} <= see([11, 222, 333], 10)
    owners = see([44, 155], 150)
    assert {44, 155} <= owners
    hot = procedure.tables[""]
    layout = SlotLayout.of(table.plan)
    sketch = hot.tensor("sketch_ids")
    assert torch.equal(sketch[:, : layout.ways].flatten(), keys_of(table))
    weights = hot.tensor("sketch_scores")[sketch == 44], hot.tensor("sketch_scores")[sketch == 11]
    assert not weights[1].numel() or weights[0] > 1000 * weights[1]


@pytest.mark.parametrize("state", ["copied", "fresh"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_promoted_row_starts_as_what_its_id_read(state: str, fused: bool) -> None:
    table = new_table(interval=4, state=state)
    layout = SlotLayout.of(table.plan)
    optimizer = None
    if fused:
        ec.fuse_optimizer(table, "adagrad", lr=0.1)
    else:
        optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    procedure = ec.TrainingProcedure(table, optimizer)
    for step in range(8):
        if optimizer is not None:
            optimizer.zero_grad()
        (table(some_ids(step)) - 1).square().sum().backward()
        if optimizer is not None:
            optimizer.step()
        if step % 4 != 3:
            procedure.step()
            continue
        owners, vectors = keys_of(table), table.to_dense()
        (sums,) = (each.tensor.clone() for each in procedure.tables[""].row_states("weight"))
        procedure.step()
        slots = (keys_of(table) != owners).nonzero().flatten()
        ids = keys_of(table)[slots]
        assert len(ids) > 3
        assert torch.equal(table.weight[layout.shared + slots], vectors[ids])
        assert torch.equal(table(ids), vectors[ids])
        (now,) = (each.tensor for each in procedure.tables[""].row_states("weight"))
        if step == 3:  # nobody owned a row, so all of them read shared ones
            buckets = torch.tensor([(v == table.weight[: layout.shared]).all(1).nonzero()[0, 0]
                                    for v in vectors[ids]])  # fmt: skip
            expected = sums[buckets] if state == "copied" else torch.zeros_like(sums[buckets])
            assert torch.equal(now[layout.shared + slots], expected)


def test_what_loses_its_row_reads_the_shared_one() -> None:
    counts = torch.zeros(ROWS)
    counts[:30] = 1
    table = ec.Embedding(ROWS, WIDTH, method=ec.Cafe(interval=1), budget=2000, counts=counts)
    procedure, layout = ec.TrainingProcedure(table), SlotLayout.of(table.plan)
    before = keys_of(table)
    (table(torch.arange(300, 600)) * torch.ones(WIDTH)).sum().backward()
    procedure.step()
    lost = sorted(set(before.tolist()) - set(keys_of(table).tolist()) - {EMPTY})
    assert lost
    from embcompress.engine.hashing import hash_bucket

    address = table.plan.probes[0].address.otherwise
    rows = hash_bucket(torch.tensor(lost), address.key, layout.shared)
    assert torch.equal(table(torch.tensor(lost)), table.weight[rows])


@pytest.mark.parametrize("rows", [ROWS, 2**45])
def test_training_goes_on_from_a_state(rows: int) -> None:
    def run(table: ec.Embedding, procedure: ec.TrainingProcedure, steps: range) -> None:
        for step in steps:
            ids = some_ids(step) * (rows // ROWS)
            (table(ids) - 1).square().mean().backward()
            procedure.step()

    def start() -> tuple[ec.Embedding, ec.TrainingProcedure]:
        table = new_table(rows, interval=3)
        ec.fuse_optimizer(table, "adagrad", lr=0.1)
        return table, ec.TrainingProcedure(table)

    whole, watch = start()
    run(whole, watch, range(20))
    first, first_watch = start()
    run(first, first_watch, range(7))
    second, second_watch = start()
    second.load_state_dict(first.state_dict())
    second_watch.load_state_dict(first_watch.state_dict())
    run(second, second_watch, range(7, 20))
    assert int(watch.tables[""].tensor("moves")) > 20
    assert torch.equal(second.weight, whole.weight) and torch.equal(second.keys, whole.keys)
    slots = SlotLayout.of(whole.plan)
    training = slots.bucket.buckets * (slots.ways + 4) * 12
    assert ec.memory(whole).training >= training
    assert ec.memory(whole).total == whole.plan.bytes <= 2000


def test_other_tables_of_keys_go_on_without_the_state() -> None:
    """Hashed keys do not say whose they are: such a table goes on, its rows found anew."""
    table = new_table(2**45, interval=1)
    procedure = ec.TrainingProcedure(table)
    ids = some_ids(0) * 2**30
    for _ in range(3):
        (table(ids) - 1).square().sum().backward()
        procedure.step()
    procedure.close()
    before = table(ids).detach()
    procedure = ec.TrainingProcedure(table)
    assert (procedure.tables[""].tensor("sketch_ids") == EMPTY).all()
    (table(ids) - 1).square().sum().backward()
    procedure.step()
    torch.testing.assert_close(table(ids), before)


def test_skewed_ids_are_learned_better_than_by_hashing() -> None:
    """Fifty ids that are seen often, among thousands: their vectors are their own."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5000, 8, generator=generator)
    errors = {}
    for method in ("hash", ec.Cafe(interval=10)):
        torch.manual_seed(1)
        table = ec.Embedding(5000, 8, method=method, budget="4%")
        optimizer = torch.optim.Adagrad(table.parameters(), lr=0.3)
        procedure = ec.TrainingProcedure(table, optimizer)
        generator.manual_seed(2)
        for _ in range(300):
            hot = torch.randint(0, 50, (200,), generator=generator) * 97
            ids = torch.cat([hot, torch.randint(0, 5000, (50,), generator=generator)])
            optimizer.zero_grad()
            noise = torch.randn(250, 8, generator=generator)  # gradients do not end, as of clicks
            (table(ids) - target[ids] - noise).square().mean().backward()
            optimizer.step()
            procedure.step()
        ids = torch.arange(50) * 97
        errors[str(method)[:4]] = float((table(ids) - target[ids]).detach().square().mean())
    assert errors["Cafe"] < 0.5 * errors["hash"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"watched": 0}, {"interval": 0}, {"decay": 1.5}, {"margin": 0.9},
        {"margin": float("nan")}, {"state": "kept"}, {"importance": "recency"},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ec.Cafe(**wrong)
