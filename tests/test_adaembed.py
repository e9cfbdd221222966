"""AdaEmbed: which ids own rows, how that changes in training, and what its importance is."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.importance import observe_half
from embcompress.layouts.pruned import PrunedLayout
from embcompress.methods import TableSpec
from tests.plan_cases import unpack_bits

ROWS, WIDTH = 300, 4


def new_table(**settings: object) -> ec.Embedding:
    torch.manual_seed(0)
    return ec.Embedding(ROWS, WIDTH, method=ec.AdaEmbed(**settings), budget="20%", name="t")


def codes_of(table: ec.Embedding) -> list[int]:
    return unpack_bits(table.codes, table.plan.store("codes").bits)[:ROWS]


def some_ids(seed: int, count: int = 64) -> torch.Tensor:
    """A few ids most of the time, in a range that moves on with the seed."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(count, generator=generator) ** 4 * ROWS).long() + 3 * seed) % ROWS


def test_ids_without_a_row_read_zero() -> None:
    table = new_table()
    codes, kept = torch.tensor(codes_of(table)), table.weight.shape[0]
    owned = codes < kept
    assert owned.sum() == kept and set(codes[~owned].tolist()) == {2**6 - 1}
    vectors = table(torch.arange(ROWS))
    assert torch.equal(vectors[owned], table.weight[codes[owned]])
    assert not vectors[~owned].any()
    vectors[~owned].sum().backward()
    assert not table.weight.grad.any()


def test_counts_give_rows_to_the_most_frequent() -> None:
    counts = torch.arange(ROWS)
    table = ec.Embedding(ROWS, WIDTH, method="adaembed", budget="20%", counts=counts)
    kept = table.weight.shape[0]
    assert codes_of(table)[::-1][:kept] == list(range(kept))


def test_importance_is_a_decaying_sum_of_gradients() -> None:
    table = new_table(interval=2, decay=0.5, rate=0.01)
    procedure = ec.TrainingProcedure(table)
    expected = torch.zeros(ROWS, dtype=torch.float64)
    for step in range(6):
        ids, target = some_ids(step), torch.randn(64, WIDTH)
        (table(ids) * target).mean().backward()
        procedure.step()
        expected.index_add_(0, ids, 64 * (target / (64 * WIDTH)).double().norm(dim=1))
        if step % 2:
            expected *= 0.5
    importance = procedure.tables[""].tensor("importance")
    assert importance.dtype == torch.float16
    torch.testing.assert_close(importance.double(), expected, rtol=5e-3, atol=1e-6)


def test_half_an_importance_stays_in_range() -> None:
    importance = torch.zeros(4, dtype=torch.float16)
    nan, infinite = float("nan"), float("inf")
    ids = torch.tensor([0, 0, 1, 2, 3, 3], dtype=torch.int32)
    observe_half(importance, ids, torch.tensor([6e4, 6e4, 1.5, nan, infinite, 2.0]))
    assert importance.tolist() == [65504.0, 1.5, 0.0, 2.0]


def test_rows_go_to_the_most_important_ids() -> None:
    table = new_table(interval=1, rate=1.0)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    procedure = ec.TrainingProcedure(table, optimizer)
    kept = table.weight.shape[0]
    before = table.weight.detach().clone()
    was = torch.tensor(codes_of(table))
    optimizer.zero_grad()
    table(torch.arange(ROWS)).sum().backward()  # every id the same gradient: nothing moves
    optimizer.step()
    procedure.step()
    assert codes_of(table) == was.tolist()
    importance = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    procedure.tables[""].tensor("importance").copy_(importance)
    procedure.step()
    now = torch.tensor(codes_of(table))
    strongest = set(importance.half().sort(descending=True, stable=True).indices[:kept].tolist())
    assert set((now < kept).nonzero().flatten().tolist()) == strongest
    stayed = (now < kept) & (was < kept)
    assert torch.equal(now[stayed], was[stayed])
    new = now[(now < kept) & (was >= kept)]
    assert len(new) and not table.weight[new].any()
    assert not optimizer.state[table.weight]["sum"][new].any()
    assert not torch.equal(table.weight[now[stayed]], before[now[stayed]])


def test_training_goes_on_from_a_state() -> None:
    def run(table: ec.Embedding, procedure: ec.TrainingProcedure, steps: range) -> None:
        for step in steps:
            (table(some_ids(step)) - 1).square().mean().backward()
            procedure.step()

    def start() -> tuple[ec.Embedding, ec.TrainingProcedure]:
        table = new_table(interval=3)
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
    assert int(watch.tables[""].tensor("moves")) > 0
    assert torch.equal(second.weight, whole.weight) and torch.equal(second.codes, whole.codes)
    importance = watch.tables[""].tensor("importance")
    assert importance.element_size() == 2 and importance.numel() == ROWS
    assert ec.memory(whole).total == whole.plan.bytes


def test_a_trained_table_keeps_the_rows_that_cost_most() -> None:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(ROWS)
    table = ec.Embedding.from_pretrained(weight, method="adaembed", budget="20%", counts=counts)
    cost = weight.square().sum(1) * counts
    kept = cost.sort(descending=True).indices[: table.weight.shape[0]]
    assert torch.equal(table(kept), weight[kept])
    assert PrunedLayout.of(table.plan).fallback is None
    with pytest.raises(ValueError, match="only tables of method 'full' can be pruned"):
        ec.prune_(table, 10)


@pytest.mark.parametrize(
    "wrong", [{"interval": 0}, {"start": -1}, {"rate": 0.0}, {"rate": 2}, {"decay": -0.1}]
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ec.AdaEmbed(**wrong)


def test_bytes() -> None:
    plan = ec.AdaEmbed().plan(TableSpec(1000, 16), 63)
    assert plan.bytes == 63 * 64 + -(-1000 * 6 // 8)
