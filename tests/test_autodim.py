"""Widths that are searched: gates by the chain rule, sizes under one budget."""

from __future__ import annotations

import itertools

import pytest
import torch

import embcompress as ec
from embcompress.methods import TableSpec
from embcompress.procedures.width_search import choose_sizes
from tests.phased_method import Model, loss, new_optimizer, train


def search(model: Model) -> ec.TrainingProcedure:
    procedure = ec.TrainingProcedure(model)
    assert procedure.begin_phase().name == "search"
    return procedure


def gates_of(sample: torch.Tensor, candidates: tuple[int, ...], width: int) -> torch.Tensor:
    gates = [sum(y for y, d in zip(sample, candidates, strict=True) if d > w) for w in range(width)]
    return torch.stack([torch.as_tensor(gate) for gate in gates])


def test_the_mixture_is_that_of_the_first_columns() -> None:
    model = Model("autodim")
    procedure = search(model)
    for k in range(2):
        table = model.table(k)
        sample = procedure.tables[f"embeddings.embedding_bags.t{k}"].tensor("sample")
        assert float(sample.sum()) == pytest.approx(1) and len(sample) == 4
        rows = table.get_parameter("weight")
        expected = torch.zeros(20, 8)
        for y, width in zip(sample, (1, 2, 4, 8), strict=True):
            expected[:, :width] += y * rows[:20, :width]
        torch.testing.assert_close(table.vectors(torch.arange(20)), expected)


def test_logits_take_the_steps_of_adam_along_the_gradient() -> None:
    """Against autograd through the Gumbel softmax, and torch's own Adam."""
    method = ec.AutoDim(rate=0.1, temperature=0.7, annealing=0.01)
    model = Model(method)
    procedure = search(model)
    table = procedure.tables["embeddings.embedding_bags.t0"]
    candidates, logits = (1, 2, 4, 8), torch.zeros(4, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.1)
    for number in range(1, 4):
        temperature = 0.7 - 0.01 * (number - 1)
        noise = table.tensor("sample").log() * temperature - logits.detach()  # but for a constant
        gates = gates_of(((logits + noise) / temperature).softmax(0), candidates, 8)
        torch.testing.assert_close(model.table(0).column_gates[0], gates)
        with procedure.validating():
            loss(model, number).backward()
        # The same batch through the gates themselves.
        model.zero_grad()
        model.table(0).get_parameter("column_gates").requires_grad_()
        loss(model, number).backward()
        gradient = model.table(0).column_gates.grad[0]
        model.table(0).get_parameter("column_gates").requires_grad_(False)
        adam.zero_grad()
        gates.backward(gradient)
        adam.step()
        procedure.step()
        torch.testing.assert_close(table.tensor("logits"), logits.detach(), atol=1e-5, rtol=1e-4)


def test_noise_depends_on_table_and_step() -> None:
    samples = []
    for _ in range(2):
        procedure = search(Model("autodim"))
        tables = list(procedure.tables.values())
        samples.append([table.tensor("sample").clone() for table in tables])
        procedure.step()
        samples[-1] += [table.tensor("sample").clone() for table in tables]
    assert all(torch.equal(one, other) for one, other in zip(*samples, strict=True))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(samples[0], 2))


@pytest.mark.parametrize("budget", [0, 7, 13, 20, 1000])
def test_the_best_sizes_that_fit_are_chosen(budget: int) -> None:
    generator = torch.Generator().manual_seed(budget)
    options = [
        {size: (size * rows, float(torch.rand((), generator=generator))) for size in (1, 2, 4)}
        for rows in (1, 2, 3)
    ]
    ways = [
        way
        for way in itertools.product((1, 2, 4), repeat=3)
        if sum(o[w][0] for o, w in zip(options, way, strict=True)) <= budget
    ]
    if not ways:
        with pytest.raises(ValueError, match="not even the smallest sizes fit"):
            choose_sizes(options, budget)
        return
    best = max(ways, key=lambda way: sum(o[w][1] for o, w in zip(options, way, strict=True)))
    assert choose_sizes(options, budget) == list(best)


def test_the_table_that_matters_gets_the_columns() -> None:
    """The label depends on the first table alone."""
    model = Model(ec.AutoDim(rate=0.3), rows=(60, 60), budget="45%")
    budget = ec.memory(model).total
    procedure = search(model)
    optimizer = new_optimizer(model, fused=True)
    procedure.attach(optimizer)
    train(model, optimizer, procedure, range(60))
    logits = [table.tensor("logits").clone() for table in procedure.tables.values()]
    assert float(logits[0].argmax()) > 0
    procedure.begin_phase()
    widths = [model.table(k).plan.stores[0].width for k in range(2)]
    assert widths[0] > widths[1] and ec.memory(model).total <= budget


def test_a_finished_table_loads_whatever_its_width() -> None:
    model = Model("autodim", budget="60%")
    procedure = search(model)
    table = procedure.tables["embeddings.embedding_bags.t1"]
    table.tensor("logits").copy_(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    procedure.begin_phase()
    procedure.close()
    assert model.table(1).plan.stores[0].width == 1
    new = Model("autodim", budget="60%")
    new.load_state_dict(model.state_dict())
    assert new.table(1).plan == model.table(1).plan
    assert torch.equal(new.table(0).to_dense(), model.table(0).to_dense())


def test_tables_grow_column_by_column_the_smaller_first() -> None:
    tables = [TableSpec(1000, 4, "large"), TableSpec(3, 4, "tiny"), TableSpec(100, 4, "small")]
    method = ec.AutoDim()
    widths = [
        [plan.stores[0].width for plan in method.group_plans(tables, size)]
        for size in method.group_sizes(tables)
    ]
    assert widths[0] == [1, 1, 1] and widths[-1] == [4, 4, 4]
    assert widths[1:3] == [[1, 4, 1], [1, 4, 2]]  # two columns of three rows take more than all
    assert method.candidates_of(tables[1]) == (1, 4)


def test_settings_are_checked() -> None:
    for settings in ({"rate": 0.0}, {"temperature": 0.0}, {"annealing": -1.0}):
        with pytest.raises(ValueError, match="must be positive and annealing not negative"):
            ec.AutoDim(**settings)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        ec.AutoDim(epochs=0)


def test_a_table_that_was_built_full_is_searched_too() -> None:
    model = Model("autodim", rows=(60, 9), budget="80%")
    assert model.table(1).plan.is_dense and model.table(1).method == "autodim"
    procedure = search(model)
    procedure.tables["embeddings.embedding_bags.t1"].tensor("logits")[0] = 9.0
    procedure.begin_phase()
    assert model.table(1).plan.stores[0].width == 1
