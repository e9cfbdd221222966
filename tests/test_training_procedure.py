"""What methods do between optimizer steps: observing, reallocating, resuming."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import embcompress as ec
from embcompress.layouts.pruned import PrunedLayout
from embcompress.models import DLRM

ROWS, WIDTH = 300, 6
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.9, centered=True),
    "sparse_adam": lambda p: torch.optim.SparseAdam(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}
FUSED = ("sgd", "adagrad", "rowwise_adagrad", "adam")
EVERY_TIME = {"interval": 1, "rate": 1.0, "decay": 1.0}


def embedding(**settings: object) -> ec.Embedding:
    torch.manual_seed(0)
    return ec.Embedding(ROWS, WIDTH, method=ec.Pruned(**settings), budget="20%")


def kept_of(table: ec.Embedding | ec.EmbeddingBag) -> set[int]:
    return set(PrunedLayout.of(table.plan).kept_ids(table.codes).tolist())


def importance_of(procedure: ec.TrainingProcedure, path: str = "") -> Tensor:
    return procedure.tables[path].tensor("importance")


def some_ids(seed: int, count: int = 64) -> Tensor:
    """Small ids are frequent."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, generator=generator) ** 4 * ROWS).long()


def train(table: nn.Module, optimizer: object, procedure: object, steps: range) -> None:
    for step in steps:
        if optimizer is not None:
            optimizer.zero_grad()
        (table(some_ids(step)) - 1).square().sum().backward()
        if optimizer is not None:
            optimizer.step()
        procedure.step()


# ------------------------------------------------------------------------------------ no work


@pytest.mark.parametrize("method", sorted({*ec.methods()} - {"pruned"}))
def test_models_without_such_methods_are_left_alone(method: str) -> None:
    model = ec.EmbeddingBagCollection([ec.TableConfig("a", ROWS, 8)], method=method)
    if any(bag.settings.procedure() for bag in model.embedding_bags.values()):
        pytest.skip(f"{method} has work to do between steps")
    before = dict(model.named_buffers())
    procedure = ec.TrainingProcedure(model)
    procedure.step()
    assert procedure.tables == {}
    assert not any(module._forward_hooks for module in model.modules())
    assert dict(model.named_buffers()).keys() == before.keys()


def test_a_static_vocabulary_is_left_alone() -> None:
    table = embedding(importance=None)
    assert ec.TrainingProcedure(table).tables == {} and not table._forward_hooks


# ----------------------------------------------------------------------------- what is observed


def test_frequencies_are_counted() -> None:
    table = embedding(interval=1000)
    procedure = ec.TrainingProcedure(table)
    expected = torch.zeros(ROWS)
    for step in range(5):
        table(some_ids(step).reshape(8, 8))
        expected += torch.bincount(some_ids(step), minlength=ROWS)
    with torch.no_grad():
        table(torch.tensor([299]))
    table.eval()
    table(torch.tensor([299]))
    assert torch.equal(importance_of(procedure), expected)


@pytest.mark.parametrize("mode", ["sum", "weights", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("form", ["table", "mapping", "feature-major"])
def test_gradient_norms_are_those_of_the_vectors(
    mode: str, padding_idx: int | None, form: str
) -> None:
    torch.manual_seed(0)
    ids, offsets = some_ids(3, 40), torch.tensor([0, 0, 7, 8, 30, 40])
    weights = torch.randn(40) if mode == "weights" else None
    pool = "sum" if mode == "weights" else mode
    method = ec.Pruned(importance="gradient", interval=1000)
    if form == "table":
        table = ec.EmbeddingBag(
            ROWS, WIDTH, mode=pool, padding_idx=padding_idx, method=method, include_last_offset=True
        )
        procedure = ec.TrainingProcedure(table)
        output = table(ids, offsets, per_sample_weights=weights)
    elif padding_idx is not None:
        pytest.skip("tables of a collection have no padding")
    else:
        configs = [
            ec.TableConfig("first", 50, 3, mode="sum"),
            ec.TableConfig("table", ROWS, WIDTH, mode=pool),
        ]
        model = ec.EmbeddingBagCollection(configs, method=method)
        table, first = model.embedding_bags["table"], model.embedding_bags["first"]
        procedure = ec.TrainingProcedure(model)
        if form == "mapping":
            given = (ids, offsets[:-1]) if weights is None else (ids, offsets[:-1], weights)
            output = model({"first": torch.arange(5), "table": given})
        else:
            both = torch.cat([torch.arange(5), ids])
            ends = torch.cat([torch.arange(5), 5 + offsets])
            ones = None if weights is None else torch.cat([torch.ones(5), weights])
            output = model(both, ends, ones)
        assert first.plan.is_dense == ("embedding_bags.first" not in procedure.tables)
        output = output[:, 3:]
    target = torch.randn(5, WIDTH)
    (output * target).square().sum().backward()

    # The same, from a leaf for every occurrence of an id.
    vectors = table.to_dense().detach()[ids].requires_grad_()
    counted = torch.ones(40) if padding_idx is None else (ids != padding_idx).float()
    bag = torch.repeat_interleave(torch.arange(5), offsets.diff())
    share = counted if weights is None else weights * counted
    if mode == "mean":
        share = share / torch.zeros(5).index_add(0, bag, counted).clamp(min=1)[bag]
    pooled = torch.zeros(5, WIDTH).index_add(0, bag, vectors * share[:, None])
    (pooled * target).square().sum().backward()
    expected = torch.zeros(ROWS).index_add(0, ids, vectors.grad.norm(dim=1))
    path = next(path for path, managed in procedure.tables.items() if managed.module is table)
    torch.testing.assert_close(importance_of(procedure, path), expected)


def test_overflowed_gradients_count_as_nothing() -> None:
    table = embedding(importance="gradient", interval=1000)
    procedure = ec.TrainingProcedure(table)
    table(torch.tensor([1, 2])).backward(torch.tensor([[torch.inf] * WIDTH, [torch.nan] * WIDTH]))
    assert not importance_of(procedure).any()


def test_a_watched_output_is_freed_at_once() -> None:
    table = embedding(importance="gradient")
    procedure = ec.TrainingProcedure(table)
    gc.disable()
    try:
        output = table(some_ids(0))
        freed = weakref.ref(output)
        output.sum().backward()
        assert importance_of(procedure).any()
        del output
        assert freed() is None
    finally:
        gc.enable()


def test_copies_and_pickles_of_a_model_are_not_observed() -> None:
    table = embedding(interval=1000)
    procedure = ec.TrainingProcedure(table)
    for twin in (copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        twin(torch.tensor([5]))
        assert not importance_of(procedure).any()
        twin.load_state_dict(table.state_dict())
    assert not any("training" in key for key in table.state_dict())
    del procedure
    gc.collect()
    table(torch.tensor([5]))  # nobody is there any more
    assert not table.training_importance.any()


def test_compiled_models_are_observed() -> None:
    table = embedding(interval=1000)
    procedure = ec.TrainingProcedure(table)
    compiled = torch.compile(table, backend="eager")
    compiled(some_ids(0))
    assert torch.equal(
        importance_of(procedure), torch.bincount(some_ids(0), minlength=ROWS).float()
    )


# --------------------------------------------------------------------------------- reallocation


def test_the_most_frequent_ids_end_up_with_the_rows() -> None:
    table = embedding(**EVERY_TIME)
    procedure = ec.TrainingProcedure(table)
    counts = torch.zeros(ROWS)
    for step in range(20):
        table(some_ids(step))
        counts += torch.bincount(some_ids(step), minlength=ROWS)
        procedure.step()
        kept = kept_of(table)
        pruned = sorted({*range(ROWS)} - kept)
        assert counts[list(kept)].min() >= counts[pruned].max()
    assert len(kept) == table.weight.shape[0] - 1
    assert int(procedure.tables[""].tensor("moves")) > 0


def test_rate_schedule_and_decay() -> None:
    table = embedding(interval=3, start=6, stop=9, rate=0.1, decay=0.5)
    procedure = ec.TrainingProcedure(table)
    pruned = torch.tensor(sorted({*range(ROWS)} - kept_of(table)))
    before, changes, expected = kept_of(table), [], torch.zeros(ROWS)
    for step in range(1, 16):
        table(pruned[:100])
        expected[pruned[:100]] += 1
        procedure.step()
        after = kept_of(table)
        if after != before:
            changes.append((step, len(before - after)))
        before = after
        if step % 3 == 0:
            expected *= 0.5
    assert changes == [(6, len(before) // 10), (9, len(before) // 10)]
    assert torch.equal(importance_of(procedure), expected)


def test_equal_importance_changes_nothing() -> None:
    table = embedding(**EVERY_TIME)
    before = kept_of(table)
    procedure = ec.TrainingProcedure(table)
    table(torch.arange(ROWS))
    procedure.step()
    assert kept_of(table) == before


@pytest.mark.parametrize("new_rows", ["fallback", "zero"])
@pytest.mark.parametrize("fallback", [1, 5])
def test_a_row_starts_from_the_fallback_or_zero(new_rows: str, fallback: int) -> None:
    table = embedding(fallback=fallback, new_rows=new_rows, **EVERY_TIME)
    procedure = ec.TrainingProcedure(table)
    before, dense = kept_of(table), table.to_dense()
    newcomer = min({*range(ROWS)} - before)
    table(torch.tensor([newcomer, newcomer]))
    procedure.step()
    after = table.to_dense()
    assert kept_of(table) - before == {newcomer}
    expected = dense[newcomer] if new_rows == "fallback" else torch.zeros(WIDTH)
    assert torch.equal(after[newcomer], expected)
    stayed = sorted(before & kept_of(table))
    assert torch.equal(after[stayed], dense[stayed])


def rows_of_state(table: ec.Embedding, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    if optimizer is None:
        return [
            t for name, t in table.named_buffers() if re.fullmatch(r"optimizer_weight_\d", name)
        ]
    state = optimizer.state[table.weight].values()
    return [t for t in state if torch.is_tensor(t) and t.shape[:1] == table.weight.shape[:1]]


@pytest.mark.parametrize("name", [*OPTIMIZERS, *(f"fused {name}" for name in FUSED)])
def test_optimizer_state_of_a_new_row_is_fresh_and_the_others_stay(name: str) -> None:
    torch.manual_seed(0)
    method = ec.Pruned(interval=10, rate=1.0)
    sparse = name == "sparse_adam"
    table = ec.Embedding(ROWS, WIDTH, sparse=sparse, method=method, budget="20%")
    optimizer = None
    if name.startswith("fused"):
        ec.fuse_optimizer(table, name.removeprefix("fused "), lr=0.05)
    else:
        optimizer = OPTIMIZERS[name]([table.weight])
    procedure = ec.TrainingProcedure(table, optimizer)
    train(table, optimizer, procedure, range(9))
    layout = PrunedLayout.of(table.plan)
    owned = layout.owned_rows(table.codes)
    before = [state.clone() for state in rows_of_state(table, optimizer)]
    procedure.step()
    now = layout.owned_rows(table.codes)
    changed = now[(now >= 0) & (owned < 0)]
    assert len(changed) > 10
    states = rows_of_state(table, optimizer)
    expected = {"sgd": 1, "adagrad": 1, "adam": 3, "rmsprop": 3, "sparse_adam": 2, "adafactor": 1}
    fused = {"fused sgd": 0, "fused adam": 2}
    assert len(states) == ({**expected, **fused}).get(name, 1)
    stayed = torch.ones(table.weight.shape[0], dtype=torch.bool)
    stayed[changed] = False
    for state, old in zip(states, before, strict=True):
        assert torch.equal(state[stayed], old[stayed])
        assert torch.all(state[changed] == (torch.tensor(0.1) if name == "adagrad" else 0))


@pytest.mark.parametrize("name", ["adagrad", "adam", "fused rowwise_adagrad"])
@pytest.mark.parametrize("importance", ["frequency", "gradient"])
def test_training_resumes_to_the_bit(name: str, importance: str) -> None:
    def start() -> tuple[ec.Embedding, torch.optim.Optimizer | None, ec.TrainingProcedure]:
        table = embedding(importance=importance, interval=4)
        optimizer = None
        if name.startswith("fused"):
            ec.fuse_optimizer(table, name.removeprefix("fused "), lr=0.05)
        else:
            optimizer = OPTIMIZERS[name]([table.weight])
        return table, optimizer, ec.TrainingProcedure(table, optimizer)

    whole, first, second = start(), start(), start()
    train(*whole, range(20))
    train(*first, range(10))
    saved = copy.deepcopy([part and part.state_dict() for part in first])
    second[0].weight.data.zero_()
    for part, state in zip(second, saved, strict=True):
        if part is not None:
            part.load_state_dict(state)
    train(*second, range(10, 20))
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[key]), key
    assert int(whole[2].tables[""].tensor("moves")) == int(second[2].tables[""].tensor("moves")) > 0


def test_state_of_other_tables_is_refused() -> None:
    procedure = ec.TrainingProcedure(embedding())
    state = procedure.state_dict()
    with pytest.raises(ValueError, match=r"of tables \[''\], this procedure has \['0'\]"):
        ec.TrainingProcedure(nn.Sequential(embedding())).load_state_dict(state)
    other = ec.Embedding(ROWS + 1, WIDTH, method="pruned")
    with pytest.raises(ValueError, match="does not fit its 'importance'"):
        ec.TrainingProcedure(other).load_state_dict(state)


# ---------------------------------------------------------------------------------------- models


def test_importance_is_training_memory_until_the_procedure_is_closed() -> None:
    table = embedding()
    before = ec.memory(table)
    procedure = ec.TrainingProcedure(table)
    assert ec.memory(table).total == before.total == table.plan.bytes
    assert ec.memory(table).training == before.training + 4 * ROWS + 8
    with pytest.raises(ValueError, match=r"has a training procedure already; call its close\(\)"):
        ec.TrainingProcedure(table)
    procedure.close()
    assert ec.memory(table) == before and not table._forward_hooks
    ec.TrainingProcedure(table)


def test_tied_tables_change_once_and_are_observed_together() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Embedding(ROWS, WIDTH)
            self.two = nn.EmbeddingBag(ROWS, WIDTH, mode="sum")
            self.two.weight = self.one.weight

    model = Twins()
    ec.compress(model, method=ec.Pruned(**EVERY_TIME), budget="20%")
    assert model.one.settings == model.two.settings == ec.Pruned(**EVERY_TIME)
    procedure = ec.TrainingProcedure(model)
    assert list(procedure.tables) == ["one"]
    newcomers = sorted({*range(ROWS)} - kept_of(model.one))[:2]
    model.one(torch.tensor(newcomers[:1]))
    model.two(torch.tensor([newcomers[1:]]))
    procedure.step()
    assert {*newcomers} <= kept_of(model.one) == kept_of(model.two)


def test_a_recommendation_model_trains_with_reallocation() -> None:
    torch.manual_seed(0)
    tables = [ec.TableConfig(name, 1000, 4, counts=None) for name in ("user", "item")]
    collection = ec.EmbeddingBagCollection(tables, method=ec.Pruned(interval=5), budget="20%")
    model = DLRM(collection, 2, bottom_widths=(4,), top_widths=(8,))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    procedure = ec.TrainingProcedure(model, optimizer)
    assert len(procedure.tables) == 2
    for step in range(10):
        ids = some_ids(step, 32)
        optimizer.zero_grad()
        logits = model(torch.randn(32, 2), torch.cat([ids, ids + 500]), torch.arange(65))
        F.binary_cross_entropy_with_logits(logits.flatten(), (ids % 2).float()).backward()
        optimizer.step()
        procedure.step()
    for table in procedure.tables.values():
        assert int(table.tensor("moves")) > 0 and table.module.weight.isfinite().all()


def test_wrong_optimizers_are_refused() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer or several"):
        ec.TrainingProcedure(embedding(), [torch.nn.Linear(1, 1)])
