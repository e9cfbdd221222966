"""Nested widths: the mask of a step, the cut to the budget, narrower tables of a trained one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import embcompress as ec
from embcompress.hashing import derive_key, hash_bucket
from embcompress.procedures.nested_dropout import drawn_width
from tests.phased_method import Model, assert_same, new_optimizer, run, score, train

WIDTH = 8


def nested(method: ec.Matryoshka, steps: int = 0) -> tuple[Model, ec.TrainingProcedure]:
    """A model some steps into its first phase."""
    model = Model(method, budget="40%")
    procedure = ec.TrainingProcedure(model)
    assert procedure.begin_phase(partial(score, model)).name == "nested"
    optimizer = new_optimizer(model, fused=True)
    procedure.attach(optimizer)
    train(model, optimizer, procedure, range(steps))
    return model, procedure


def test_widths_are_the_specified_hash_and_all_occur() -> None:
    key = derive_key(3, "nested dropout", 0)
    drawn = [drawn_width((1, 2, 4, 8), 3, step) for step in range(400)]
    assert drawn == [(1, 2, 4, 8)[hash_bucket(step, key, 4)] for step in range(400)]
    assert all(80 <= drawn.count(width) <= 120 for width in (1, 2, 4, 8))


@pytest.mark.parametrize("widths", [None, (3, 5, 100)])
def test_a_nested_step_sees_the_first_columns(widths: tuple[int, ...] | None) -> None:
    model, procedure = nested(ec.Matryoshka(widths=widths, seed=1))
    table, ids = model.table(0), torch.arange(60)
    assert table.weight.shape == (60, WIDTH) and not table.mask.requires_grad
    for step in range(1, 6):
        procedure.step()
        width = drawn_width((1, 2, 4, 8) if widths is None else (3, 5, 8), 1, step)
        expected = table.weight.detach().clone()
        expected[:, width:] = 0
        assert torch.equal(table.vectors(ids), expected)


def test_gradients_reach_the_first_columns_alone() -> None:
    model = Model(ec.Matryoshka(widths=(2,)), budget="40%")
    procedure = ec.TrainingProcedure(model)
    procedure.begin_phase(partial(score, model))
    while model.table(0).mask.sum() != 2:
        procedure.step()
    model(torch.randint(0, 40, (30, 2))).sum().backward()
    gradient = model.table(0).weight.grad
    assert gradient[:, :2].any() and not gradient[:, 2:].any()
    assert model.table(0).mask.grad is None


def test_the_cut_keeps_the_first_columns_and_the_budget() -> None:
    model, procedure = nested(ec.Matryoshka(), steps=5)
    built = [ec.Matryoshka().plan(table_spec(table), 3).bytes for table in tables(model)]
    weights = [table.weight.detach().clone() for table in tables(model)]
    assert ec.memory(model.embeddings).training > 0
    assert procedure.begin_phase(partial(score, model)).name == "cut"
    assert procedure.begin_phase(partial(score, model)) is None
    for table, weight, limit in zip(tables(model), weights, built, strict=True):
        width = table.weight.shape[1]
        assert 1 <= width < WIDTH and table.plan.bytes <= limit
        expected = weight.clone()
        expected[:, width:] = 0
        torch.testing.assert_close(table.vectors(torch.arange(len(weight))), expected)
    assert ec.memory(model.embeddings).total <= 0.4 * 100 * WIDTH * 4


def tables(model: Model) -> list[ec.EmbeddingBag]:
    return [model.table(0), model.table(1)]


def table_spec(table: ec.EmbeddingBag) -> object:
    from embcompress.methods import TableSpec

    return TableSpec(table.num_embeddings, WIDTH)


@pytest.mark.parametrize("resume_at", [(0, 3), (1, 2)])
def test_training_goes_on_after_an_interruption(resume_at: tuple[int, int]) -> None:
    whole = run(Model(ec.Matryoshka()))
    halves = run(Model(ec.Matryoshka()), resume_at=resume_at)
    for one, other in zip(whole, halves, strict=True):
        assert_same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("method", ["matryoshka", "full"])
def test_a_trained_table_is_cut_to_other_widths(method: str) -> None:
    torch.manual_seed(0)
    table = ec.EmbeddingBag(50, WIDTH, mode="sum", method=method, budget="100%")
    ids, offsets = torch.arange(50), torch.tensor([0, 10, 30])
    stored = table.weight.shape[1]
    for width in range(1, stored + 1):
        small = ec.Matryoshka.cut(table, width)
        weight = table.weight.detach().clone()
        weight[:, width:] = 0
        vectors = weight if method == "full" else weight @ table.projection.detach().T
        torch.testing.assert_close(small.vectors(ids), vectors)
        bags = torch.stack([vectors[:10].sum(0), vectors[10:30].sum(0), vectors[30:].sum(0)])
        torch.testing.assert_close(small(ids, offsets), bags)
        assert small.plan.bytes == 4 * width * (50 + WIDTH) == ec.memory(small).total
        assert isinstance(small, ec.EmbeddingBag)
        # It is a copy.
        small.weight.data.zero_()
        assert table.weight.any()
    with pytest.raises(ValueError, match=rf"width must be in \[1, {stored}\], got {stored + 1}"):
        ec.Matryoshka.cut(table, stored + 1)
    with pytest.raises(ValueError, match="cut takes a table of floats"):
        ec.Matryoshka.cut(ec.Embedding(50, WIDTH, method="int8"), 2)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="nested_epochs must be at least 1, got 0"):
        ec.Matryoshka(nested_epochs=0)
    with pytest.raises(ValueError, match="widths must be at least 1"):
        ec.Matryoshka(widths=(0, 2))
