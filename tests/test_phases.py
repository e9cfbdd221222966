"""Phases: tables that take other plans, layers that start again, examples that only gates see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import embcompress as ec
from embcompress.optimizers import unfuse_optimizer
from embcompress.procedures.phases import Phase, common_phases
from embcompress.training.recipe import make_optimizer
from tests.phased_method import (
    RETRAIN,
    SEARCH,
    Model,
    Searched,
    assert_same,
    gated_plan,
    loss,
    new_optimizer,
    run,
    train,
)


def test_a_table_is_built_small_searches_large_and_ends_small() -> None:
    model = Model(Searched())
    built = [model.table(k).plan for k in range(2)]
    budget = ec.memory(model).total
    assert budget == sum(plan.bytes for plan in built) and ec.memory(model).training == 0
    procedure = ec.TrainingProcedure(model)
    assert procedure.phases == (SEARCH, RETRAIN) and procedure.phase is None
    assert procedure.begin_phase() == SEARCH
    assert [model.table(k).plan for k in range(2)] == [gated_plan(plan) for plan in built]
    size = ec.memory(model)
    gates = 2 * 8 * 4
    assert size.total == budget and size.total + size.training == size.dense + 2 * gates
    assert procedure.begin_phase() == RETRAIN
    assert [model.table(k).plan for k in range(2)] == built
    assert ec.memory(model).total == budget and ec.memory(model).training == 0
    assert procedure.begin_phase() is None


def test_start_values_depend_on_name_and_seed_alone() -> None:
    model = Model(Searched())
    procedure = ec.TrainingProcedure(model)
    procedure.begin_phase()
    first = [model.table(k).get_parameter("weight").detach().clone() for k in range(2)]
    assert not torch.equal(first[0][:40], first[1])
    for weight in first:  # the deviation that the tables were built with
        assert 0.25 < float(weight.std()) < 0.35
    again = Model(Searched())
    torch.manual_seed(5)
    ec.TrainingProcedure(again).begin_phase()
    assert torch.equal(again.table(1).get_parameter("weight"), first[1])


@pytest.mark.parametrize("fused", [True, False])
def test_layers_keep_or_go_back_to_their_start(fused: bool) -> None:
    model = Model(Searched())
    before = {name: p.detach().clone() for name, p in model.layer.named_parameters()}
    procedure = ec.TrainingProcedure(model)
    procedure.begin_phase()
    optimizer = new_optimizer(model, fused)
    procedure.attach(optimizer)
    train(model, optimizer, procedure, range(3))
    assert not torch.equal(model.layer.weight, before["weight"])
    procedure.begin_phase()
    for name, parameter in model.layer.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("fused", [True, False])
def test_from_validation_examples_nothing_but_gates_learns(fused: bool) -> None:
    model = Model(Searched())
    procedure = ec.TrainingProcedure(model)
    procedure.begin_phase()
    optimizer = new_optimizer(model, fused)
    procedure.attach(optimizer)
    train(model, optimizer, procedure, range(1))
    sums = procedure.tables["embeddings.embedding_bags.t0"].tensor("sums")
    before, seen = {k: v.clone() for k, v in model.state_dict().items()}, sums.clone()
    assert bool(seen.any())
    optimizer.zero_grad()
    loss(model, 7).backward()  # a training batch: only the weights
    assert torch.equal(sums, seen)
    if fused:
        weight = "embeddings.embedding_bags.t0.weight"
        assert not torch.equal(model.state_dict()[weight], before[weight])
    optimizer.zero_grad()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with procedure.validating():
        loss(model, 8).backward()
    assert not torch.equal(sums, seen)
    assert_same(dict(model.state_dict()), before)
    assert all(bag.weight.grad is None for bag in model.embeddings.embedding_bags.values())


def test_the_gradients_of_validation_examples_are_those_of_the_loss() -> None:
    model = Model(Searched())
    procedure = ec.TrainingProcedure(model)
    procedure.begin_phase()
    with procedure.validating():
        loss(model, 8).backward()
    found = [
        procedure.tables[f"embeddings.embedding_bags.t{k}"].tensor("sums").clone() for k in range(2)
    ]
    procedure.close()
    for k in range(2):
        model.table(k).get_parameter("gates").requires_grad_()
    loss(model, 8).backward()
    for k in range(2):
        torch.testing.assert_close(found[k], model.table(k).get_parameter("gates").grad[0])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("at", [(0, 0), (0, 3), (1, 0), (1, 3)])
def test_training_goes_on_in_the_middle_of_every_phase(at: tuple[int, int], fused: bool) -> None:
    straight, resumed = (run(Model(Searched()), fused, 6, where) for where in (None, at))
    for one, other in zip(straight, resumed, strict=True):
        assert_same(dict(one.state_dict()), dict(other.state_dict()))


def test_a_finished_model_loads_into_a_new_one() -> None:
    model, *_ = run(Model(Searched()))
    unfuse_optimizer(model)

    @dataclass(frozen=True)
    class Wider(Searched):
        name: ClassVar[str] = "wider"

    new = Model(Wider(), budget="60%")
    assert new.table(0).plan != model.table(0).plan
    new.load_state_dict(model.state_dict())
    assert new.table(0).plan == model.table(0).plan
    assert torch.equal(new.table(0).to_dense(), model.table(0).to_dense())


@pytest.mark.parametrize("engine", ["kernel", "torch"])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_an_optimizer_can_be_fused_anew(
    name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "torch":
        monkeypatch.setattr("embcompress.engine.ops.is_available", lambda: False)
    table, twin = (Model(ec.LowDim()) for _ in range(2))
    for _ in range(2):
        ec.fuse_optimizer(table, name, lr=0.1)
        loss(table, 0).backward()
        unfuse_optimizer(table)
    assert all(p.requires_grad for p in table.parameters())
    assert ec.memory(table).training == 0
    for model in (table, twin):
        ec.fuse_optimizer(model, name, lr=0.1)
    twin.load_state_dict(table.state_dict())
    for model in (table, twin):
        loss(model, 1).backward()
    assert_same(dict(table.state_dict()), dict(twin.state_dict()))


def test_tied_tables_change_together() -> None:
    model = Model(Searched())
    twin = ec.EmbeddingBag.from_plan(model.table(0).plan.with_pool("mean"), Searched())
    twin.adopt_stores(model.table(0).stores())
    for name, store in model.table(0).stores().items():
        setattr(twin, name, store)
    model.add_module("twin", twin)
    procedure = ec.TrainingProcedure(model)
    while procedure.begin_phase() is not None:
        assert twin.mode == "mean" and model.table(0).mode == "sum"
        assert twin.plan.stores == model.table(0).plan.stores
        assert all(twin.stores()[k] is v for k, v in model.table(0).stores().items())
        make_optimizer(model, 0.1)
        loss(model, 0).backward()
    assert ec.memory(model).total == sum(model.table(k).plan.bytes for k in range(2))


def test_tables_of_one_phase_train_along_and_begin_again() -> None:
    model = Model(Searched())
    torch.manual_seed(0)
    other = ec.EmbeddingBag(60, 8, method=ec.Pruned(interval=1), budget="40%", mode="sum")
    model.embeddings.embedding_bags["t0"] = other
    before = {name: store.clone() for name, store in other.stores().items()}
    procedure = ec.TrainingProcedure(model)
    assert set(procedure.tables) == {"embeddings.embedding_bags.t0"}
    procedure.begin_phase()
    optimizer = make_optimizer(model, 0.1)
    procedure.attach(optimizer)
    assert len(procedure.tables) == 2
    train(model, optimizer, procedure, range(4))
    assert not torch.equal(other.stores()["weight"], before["weight"])
    procedure.begin_phase()
    assert_same({k: v.detach() for k, v in other.stores().items()}, before)
    assert not procedure.tables["embeddings.embedding_bags.t0"].tensor("importance").any()


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="phase 'a' of table 't' needs a number of epochs"):
        common_phases({"t": (Phase("a"), Phase("b"))})
    with pytest.raises(ValueError, match="distinct names"):
        common_phases({"t": (Phase("a", 1), Phase("a"))})
    with pytest.raises(ValueError, match="'t' and 'u' are trained in different phases"):
        common_phases({"t": (Phase("a", 1), Phase("b")), "u": (Phase("a", 2), Phase("b"))})
    with pytest.raises(ValueError, match="epochs of phase 'a'"):
        Phase("a", 0)
    with pytest.raises(ValueError, match="split must be"):
        Phase("a", split="test")
    with pytest.raises(ValueError, match="weights must be"):
        Phase("a", weights="none")
    procedure = ec.TrainingProcedure(Model(Searched(excess=1)))
    procedure.begin_phase()
    with pytest.raises(RuntimeError, match="an error of their methods"):
        procedure.begin_phase()
    procedure = ec.TrainingProcedure(Model(Searched()))
    with pytest.raises(ValueError, match="of phase 'prune'"):
        procedure.load_state_dict({"phase": "prune", "tables": {}, "forms": {}})
