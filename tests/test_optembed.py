"""Rows by learned thresholds, widths by evolution, and one budget for both."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.layouts.kept_rows import KeptRows, codes_of, strongest_within
from embcompress.layouts.packing import unpack_codes
from embcompress.methods import TableSpec
from embcompress.procedures.evolution import Evolution
from embcompress.procedures.row_thresholds import step_slope
from tests.phased_method import Model, batch, loss, new_optimizer, score, train


def supernet(model: Model) -> ec.TrainingProcedure:
    procedure = ec.TrainingProcedure(model)
    assert procedure.begin_phase().name == "supernet"
    return procedure


def path(number: int) -> str:
    return f"embeddings.embedding_bags.t{number}"


class Step(torch.autograd.Function):
    """1 where a distance is positive, with the slope of the hat."""

    @staticmethod
    def forward(ctx: object, distance: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(distance)
        return (distance > 0).float()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * step_slope(*ctx.saved_tensors)


def test_the_hat_has_the_area_of_the_step() -> None:
    distance = torch.linspace(-2, 2, 400_001)
    assert float(torch.trapezoid(step_slope(distance), distance)) == pytest.approx(1.44, abs=1e-3)
    expected = torch.tensor([2.0, 1.0, 1.0, 0.4, 0.4, 0.0])
    actual = step_slope(torch.tensor([0.0, 0.25, -0.25, 0.5, -1.0, 1.1]))
    torch.testing.assert_close(actual, expected)


def test_thresholds_take_the_steps_of_the_loss_and_its_pressure() -> None:
    """Against autograd through the step function."""
    model = Model(ec.OptEmbed(rate=0.5, pressure=0.1))
    procedure = supernet(model)
    thresholds = [procedure.tables[path(k)].tensor("threshold") for k in range(2)]
    for number, start in enumerate((0.0, 1.5)):
        for threshold in thresholds:
            threshold.fill_(start)
        procedure.step()  # opens gates by the thresholds, which pressure has raised
        before = [threshold.clone().requires_grad_() for threshold in thresholds]
        weights = [model.table(k).get_parameter("weight").detach() for k in range(2)]
        gates = [model.table(k).column_gates.detach() for k in range(2)]
        ids, label = batch(number, model)
        vectors = [
            Step.apply(w[x].abs().sum(1) - t)[:, None] * w[x] * g
            for w, x, t, g in zip(weights, ids.unbind(1), before, gates, strict=True)
        ]
        logits = model.layer(torch.cat(vectors, 1)).flatten()
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, label)
        actual = loss(model, number)
        torch.testing.assert_close(actual, expected)
        (expected + 0.1 * sum(torch.exp(-t).sum() for t in before)).backward()
        actual.backward()
        procedure.step()
        for threshold, old in zip(thresholds, before, strict=True):
            torch.testing.assert_close(threshold, (old - 0.5 * old.grad).detach())


def test_the_gates_are_those_of_the_thresholds_and_of_drawn_widths() -> None:
    model = Model("optembed")
    procedure = supernet(model)
    widths = []
    for _ in range(30):
        procedure.tables[path(0)].tensor("threshold").fill_(1.8)
        procedure.step()
        table = model.table(0)
        threshold = procedure.tables[path(0)].tensor("threshold")
        norms = table.get_parameter("weight").abs().sum(1)
        assert torch.equal(table.row_gates[:, 0], (norms > threshold).float())
        assert 0 < float(table.row_gates.sum()) < 60
        width = int(table.column_gates.sum())
        assert torch.equal(table.column_gates[0], (torch.arange(8) < width).float())
        widths.append(width)
    assert set(widths) == set(range(1, 9))


def test_what_is_kept_starts_again_from_its_first_values() -> None:
    model = Model("optembed")
    budget = ec.memory(model).total
    procedure = supernet(model)
    start = [model.table(k).get_parameter("weight").detach().clone() for k in range(2)]
    optimizer = new_optimizer(model, fused=True)
    procedure.attach(optimizer)
    train(model, optimizer, procedure, range(10))
    norms = [model.table(k).get_parameter("weight").abs().sum(1) for k in range(2)]
    procedure.begin_phase(lambda: score(model))
    assert 0.5 * budget < ec.memory(model).total <= budget
    for k in range(2):
        table = model.table(k)
        layout = KeptRows.of(table.plan)
        kept = norms[k].argsort(descending=True, stable=True)[: layout.kept]
        expected = torch.zeros_like(start[k])
        expected[kept, : layout.width] = start[k][kept, : layout.width]
        torch.testing.assert_close(table.to_dense(), expected)


def test_the_choice_of_widths_scores_at_least_as_well_as_equal_ones() -> None:
    scores: dict[tuple[int, ...], float] = {}
    model = Model(ec.OptEmbed(generations=2, mutations=4, crossovers=4))
    procedure = supernet(model)

    def known() -> float:
        widths = tuple(int(model.table(k).column_gates.sum()) for k in range(2))
        scores[widths] = -abs(widths[0] - 6) - abs(widths[1] - 3)
        return scores[widths]

    procedure.begin_phase(known)
    chosen = tuple(KeptRows.of(model.table(k).plan).width for k in range(2))
    assert {(1, 1), (2, 2), (4, 4), (8, 8)} <= set(scores) and len(scores) > 10
    assert scores[chosen] == max(scores.values())


def test_without_scores_there_is_an_error() -> None:
    procedure = supernet(Model("optembed"))
    with pytest.raises(ValueError, match=r"pass a function that gives them"):
        procedure.begin_phase()
    assert procedure.phase.name == "supernet"


def test_evolution_climbs_to_the_best() -> None:
    goal, tried = (5, 1, 8, 3), []

    def value(genes: tuple[int, ...]) -> float | None:
        tried.append(genes)
        distance = sum(abs(a - b) for a, b in zip(genes, goal, strict=True))
        return None if genes[0] > 6 else -float(distance)

    evolution = Evolution(30, 10, 10, 10, 0.3)
    best = evolution.best([8] * 4, value, torch.Generator().manual_seed(0))
    assert best == goal and len(tried) == len(set(tried))
    again = evolution.best([8] * 4, value, torch.Generator().manual_seed(0))
    assert again == best
    assert evolution.best([2], lambda genes: None, torch.Generator()) is None


@pytest.mark.parametrize("budget", [40, 100, 400, 900, 3000])
def test_rows_above_one_bound_fill_the_budget(budget: int) -> None:
    generator = torch.Generator().manual_seed(1)
    specs, widths = [TableSpec(50, 4, "a"), TableSpec(30, 4, "b")], [3, 4]
    margins = [
        torch.randn(spec.num_embeddings, generator=generator).sort(descending=True).values
        for spec in specs
    ]

    def size(kept: list[int]) -> int:
        parts = zip(kept, widths, specs, strict=True)
        return sum(
            min(KeptRows(count, each).plan(spec).bytes for each in (width, 4))
            for count, width, spec in parts
        )

    layouts = strongest_within(specs, widths, margins, budget)
    if layouts is None:
        assert size([1, 1]) > budget
        return
    kept = [layout.kept for layout in layouts]
    assert size(kept) <= budget
    assert size(kept) == sum(
        each.plan(spec).bytes for each, spec in zip(layouts, specs, strict=True)
    )
    positive = [int((margin > 0).sum()) for margin in margins]
    assert all(count <= most for count, most in zip(kept, positive, strict=True))
    if kept != positive:  # the strongest row that is left takes too much
        pairs = list(zip(margins, kept, strict=True))
        following = max(float(margin[count]) for margin, count in pairs)
        assert size([max(k, int((m >= following).sum())) for m, k in pairs]) > budget


@pytest.mark.parametrize(("kept", "width"), [(1, 1), (7, 3), (20, 8), (20, 5)])
def test_ids_without_a_row_are_zero(kept: int, width: int) -> None:
    spec = TableSpec(20, 8)
    plan = KeptRows(kept, width).plan(spec)
    assert KeptRows.of(plan) == KeptRows(kept, width)
    module = ec.Embedding.from_plan(plan)
    ids = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:kept]
    expected = torch.zeros(20, width)
    if kept < 20:
        module.codes.copy_(codes_of(ids, 20))
        bits = plan.store("codes").bits
        assert unpack_codes(module.codes, 0, 20, bits)[ids].tolist() == list(range(kept))
        expected[ids] = module.weight.detach()
    else:
        expected = module.weight.detach()
    if width < 8:
        expected = expected @ module.projection.detach().t()
    torch.testing.assert_close(module.to_dense(), expected)


def test_settings_are_checked() -> None:
    for settings, match in (
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"mutations": 0}, "mutations must be at least 1, got 0"),
        ({"parents": 0}, "parents must be at least 1, got 0"),
        ({"mutation_rate": 0.0}, r"mutation_rate in \(0, 1\], got"),
        ({"rate": -1.0}, "rate must be positive"),
    ):
        with pytest.raises(ValueError, match=match):
            ec.OptEmbed(**settings)
