"""prune_() and restore_(): vectors and optimizer state of kept ids stay what they are."""

from __future__ import annotations

import copy

import pytest
import torch

import embcompress as ec
from embcompress.layouts.pruned import PrunedLayout
from tests.test_training_procedure import FUSED, OPTIMIZERS

ROWS, WIDTH = 200, 6
KEPT = torch.tensor([7, 3, 199, 0, 42, 41, 150])


def full(**arguments: object) -> ec.Embedding:
    torch.manual_seed(0)
    return ec.Embedding(ROWS, WIDTH, **arguments)


@pytest.mark.parametrize("fallback", [1, 9])
def test_the_round_trip_is_exact_for_kept_ids(fallback: int) -> None:
    table = full()
    before = table.weight.detach().clone()
    kept = ec.prune_(table, KEPT, method=ec.Pruned(fallback), seed=1)
    assert torch.equal(kept, KEPT) and table.method == "pruned"
    assert table.settings == ec.Pruned(fallback)
    assert torch.equal(table.weight[fallback:], before[KEPT])  # in the order that was given
    assert torch.equal(table(KEPT), before[KEPT])
    assert (
        ec.memory(table).total
        == table.plan.bytes
        == (7 + fallback) * WIDTH * 4 + -(-ROWS * (7 + fallback).bit_length() // 8)
    )
    read = table.to_dense()
    ec.restore_(table)
    assert table.method == "full" and table.plan == full().plan
    assert torch.equal(table.weight, read)
    assert torch.equal(table.weight[KEPT], before[KEPT])


def test_given_values_take_the_place_of_the_fallback() -> None:
    table = full()
    before = table.weight.detach().clone()
    ec.prune_(table, KEPT)
    with torch.no_grad():
        table.weight += 1
    ec.restore_(table, before.double())
    expected = before.clone()
    expected[KEPT] += 1
    assert torch.equal(table.weight, expected)


def test_the_fallback_is_the_weighted_mean_or_what_is_given() -> None:
    pruned = [x for x in range(ROWS) if x not in KEPT]
    table, weight = full(), full().weight.detach()
    ec.prune_(table, KEPT)
    torch.testing.assert_close(table(torch.tensor(5)), weight[pruned].mean(0))
    counts = torch.arange(ROWS).double()
    table = full()
    ec.prune_(table, KEPT, counts=counts)
    expected = (weight[pruned] * counts[pruned, None]).sum(0) / counts[pruned].sum()
    torch.testing.assert_close(table(torch.tensor(5)), expected.float())
    table = full()
    ec.prune_(table, KEPT, fallback=torch.full((1, WIDTH), 3.0))
    assert torch.equal(table(torch.tensor(5)), torch.full((WIDTH,), 3.0))


def test_a_number_keeps_the_largest_counts_or_the_farthest_vectors() -> None:
    counts = torch.randint(0, 9, (ROWS,), generator=torch.Generator().manual_seed(1))
    kept = ec.prune_(full(), 30, counts=counts)
    assert kept.tolist() == sorted(range(ROWS), key=lambda x: (-int(counts[x]), x))[:30]
    weight = full().weight.detach()
    distance = (weight - weight.mean(0)).norm(dim=1)
    assert set(ec.prune_(full(), 30).tolist()) == set(distance.argsort()[-30:].tolist())
    padded = full(padding_idx=int(kept[0]))
    assert int(kept[0]) not in ec.prune_(padded, 30, counts=counts)


def test_a_pruned_table_can_be_pruned_further() -> None:
    table = full()
    ec.prune_(table, KEPT, method=ec.Pruned(3))
    before, shared = table.to_dense(), table.weight[:3].detach().clone()
    kept = ec.prune_(table, 3, counts=torch.arange(ROWS))
    assert kept.tolist() == [199, 150, 42]
    assert torch.equal(table.weight[:3], shared) and torch.equal(table(kept), before[kept])
    others = torch.tensor([x for x in range(ROWS) if x not in KEPT])
    assert torch.equal(table(others), before[others])
    with pytest.raises(ValueError, match="keep has id 7, which was pruned before"):
        ec.prune_(table, torch.tensor([42, 7]))
    with pytest.raises(ValueError, match=r"a number of them in \[1, 3\], got 4"):
        ec.prune_(table, 4)


def make_optimizer(name: str, table: ec.Embedding) -> torch.optim.Optimizer | None:
    if not name.startswith("fused"):
        return OPTIMIZERS[name](list(table.parameters()))
    ec.fuse_optimizer(table, name.removeprefix("fused "), lr=0.05)
    return None


def train(table: ec.Embedding, optimizer: torch.optim.Optimizer | None, steps: range) -> None:
    """On kept ids alone, so that every table does the same with their rows."""
    for step in steps:
        if optimizer is not None:
            optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        ids = KEPT[torch.randint(0, len(KEPT), (9,), generator=generator)]
        (table(ids) - step).square().sum().backward()
        if optimizer is not None:
            optimizer.step()


# Adafactor has statistics of whole columns, which do not stay what they are.
BY_ROW = sorted({*OPTIMIZERS} - {"adafactor"})


@pytest.mark.parametrize("engine", ["kernel", "torch"])
@pytest.mark.parametrize("name", [*BY_ROW, *(f"fused {name}" for name in FUSED)])
def test_training_goes_on_as_if_nothing_had_been(
    name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "torch":
        monkeypatch.setattr("embcompress.engine.ops.is_available", lambda: False)
    table, twin = (full(sparse=name == "sparse_adam") for _ in range(2))
    optimizer, twin_optimizer = make_optimizer(name, table), make_optimizer(name, twin)
    train(twin, twin_optimizer, range(9))

    train(table, optimizer, range(3))
    ec.prune_(table, KEPT, optimizer=optimizer)
    assert len(table.weight) == 8
    train(table, optimizer, range(3, 6))
    ec.restore_(table, optimizer=optimizer)
    train(table, optimizer, range(6, 9))
    torch.testing.assert_close(table.weight[KEPT], twin.weight[KEPT], rtol=1e-6, atol=1e-6)
    if optimizer is not None:
        assert list(optimizer.state) == optimizer.param_groups[0]["params"] == [table.weight]
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", ["adagrad", "fused adam"])
def test_state_of_restored_ids_is_fresh(name: str) -> None:
    table = full()
    optimizer = make_optimizer(name, table)
    train(table, optimizer, range(3))
    ec.prune_(table, KEPT, optimizer=optimizer)
    table(torch.arange(ROWS)).sum().backward()
    if optimizer is not None:
        optimizer.step()
    ec.restore_(table, optimizer=optimizer)
    states = (
        [optimizer.state[table.weight]["sum"]]
        if optimizer is not None
        else [table.optimizer_weight_0, table.optimizer_weight_1]
    )
    fresh = 0.1 if name == "adagrad" else 0.0
    pruned = [x for x in range(ROWS) if x not in KEPT]
    for state in states:
        assert state.shape == (ROWS, WIDTH)
        assert torch.all(state[pruned] == torch.tensor(fresh)) and torch.all(state[KEPT] != fresh)


def test_only_the_groups_of_the_table_change() -> None:
    table, layer = full(), torch.nn.Linear(3, 3)
    old = table.weight
    groups = [{"params": layer.parameters()}, {"params": [table.weight], "lr": 0.5}]
    optimizer, other = torch.optim.SGD(groups, lr=0.1), torch.optim.SGD(layer.parameters(), lr=0.1)
    ec.prune_(table, KEPT, optimizer=[optimizer, other])
    assert optimizer.param_groups[1]["params"] == [table.weight]
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert [*optimizer.param_groups[0]["params"], *other.param_groups[0]["params"]] == 2 * [
        *layer.parameters()
    ]
    assert old is not table.weight and not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bags_keep_mode_padding_dtype_and_training(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bags = ec.EmbeddingBag(ROWS, WIDTH, mode="max", padding_idx=3, dtype=dtype).eval()
    bags.requires_grad_(False)
    ids = KEPT[torch.randint(0, 7, (5, 4), generator=torch.Generator().manual_seed(0))]
    expected = bags(ids)
    ec.prune_(bags, KEPT)
    assert torch.equal(bags(ids), expected) and bags.padding_idx == 3
    ec.restore_(bags)
    assert torch.equal(bags(ids), expected) and bags.mode == "max"
    assert bags.weight.dtype == dtype and not bags.weight.requires_grad and not bags.training


def test_a_saved_pruned_table_loads_into_another_that_was_cut_alike() -> None:
    table, other = full(), full()
    ec.prune_(table, KEPT)
    ec.prune_(other, KEPT.flip(0), fallback=torch.zeros(1, WIDTH))
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.to_dense(), table.to_dense())


def test_a_collection_reads_its_pruned_table() -> None:
    tables = [ec.TableConfig("a", ROWS, WIDTH), ec.TableConfig("b", 50, 3)]
    model = ec.EmbeddingBagCollection(tables)
    batch = {"a": KEPT[:4], "b": torch.arange(4)}
    expected = model(batch)
    ec.prune_(model.embedding_bags["a"], KEPT)
    assert torch.equal(model(batch), expected)


def test_importance_of_training_chooses_what_to_keep() -> None:
    table = full()
    ec.prune_(table, 100, counts=torch.arange(ROWS), method=ec.Pruned(interval=10**6))
    procedure = ec.TrainingProcedure(table)
    table(torch.tensor([150, 150, 160, 101, 101, 101]))
    importance = procedure.tables[""].tensor("importance")
    assert ec.prune_(table, 3, counts=importance).tolist() == [101, 150, 160]
    procedure.step()
    assert PrunedLayout.of(table.plan).kept == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": 0}, ValueError, r"a number of them in \[1, 200\], got 0"),
        ({"keep": True}, ValueError, "got True"),
        ({"keep": torch.tensor([1, 2, 1])}, ValueError, "keep has id 1 more than once"),
        ({"keep": torch.tensor([1, 200])}, IndexError, "keep has id 200"),
        ({"keep": torch.tensor([1.5])}, TypeError, "keep must hold integer ids"),
        ({"keep": torch.tensor([], dtype=torch.int64)}, ValueError, "at least one"),
        ({"keep": 5, "counts": torch.ones(3)}, ValueError, r"shape \(200,\)"),
        ({"keep": 5, "fallback": torch.ones(3)}, ValueError, r"fallback must have shape \(1, 6\)"),
        ({"keep": 5, "optimizer": 3}, TypeError, "optimizer|iterable"),
    ],
)
def test_wrong_arguments_change_nothing(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    table = full()
    weight, plan = table.weight, table.plan
    with pytest.raises(error, match=message):
        ec.prune_(table, **arguments)
    assert table.weight is weight and table.plan is plan


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(TypeError, match=r"see ec\.prune_vocabulary"):
        ec.prune_(torch.nn.Embedding(3, 3), 1)
    for method in ("hash", "low_dim"):
        with pytest.raises(ValueError, match="only tables of method 'full' can be pruned"):
            ec.prune_(full(method=method), 5)
    with pytest.raises(ValueError, match="those of 'pruned' restored"):
        ec.restore_(full())
    with pytest.raises(ValueError, match="max_norm"):
        ec.prune_(full(max_norm=1.0), 5)
    table = full()
    ec.prune_(table, KEPT)
    with pytest.raises(ValueError, match=r"values must have shape \(200, 6\), got \(200, 5\)"):
        ec.restore_(table, torch.zeros(200, 5))
