"""A small method with phases, and a loop that runs any: for the tests of phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

import embcompress as ec
from embcompress.collection import full_plan
from embcompress.methods.low_dim import LowDim
from embcompress.plan import Digit, LookupPlan, Probe, Store
from embcompress.procedures.base import Observes, TableProcedure, TrainedTable
from embcompress.procedures.phases import Phase, PhasedTable, Score, TableForm
from embcompress.training.recipe import make_optimizer

SEARCH, RETRAIN = Phase("search", 2, split="validation"), Phase("retrain", weights="initial")


class Gates(TableProcedure):
    """Adds the gradient of every column's gate to it."""

    observes: Observes = "gradients of vectors"

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        return {"sums": torch.zeros(table.plan.embedding_dim)}

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        table.tensor("sums").add_((amounts * table.stores()["weight"][ids]).sum(0))

    def is_due(self, number: int) -> bool:
        return number % 2 == 0

    def step(self, table: TrainedTable, number: int) -> None:
        table.stores()["gates"].sub_(0.01 * number * table.tensor("sums"))


@dataclass(frozen=True)
class Searched(LowDim):
    """Gated columns of the full table, then the narrow rows that it was built with.

    Attributes:
        excess: columns that it takes too many in the end.
    """

    name: ClassVar[str] = "searched"
    searches_plans: ClassVar[bool] = True
    excess: int = 0
    needs_score: bool = False

    def phases(self) -> tuple[Phase, ...]:
        return SEARCH, RETRAIN

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        return Gates() if phase == SEARCH else None

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        if self.needs_score:
            assert score is not None and 0 <= score() <= 1
        return [self._form(phase, table) for table in tables]

    def _form(self, phase: Phase, table: PhasedTable) -> TableForm:
        stores = table.new_stores(full_plan(table.spec))
        if phase == SEARCH:
            stores["gates"] = torch.ones(1, table.built.embedding_dim)
            return TableForm(gated_plan(table.built), stores, frozen=("gates",))
        if table.built.is_dense:
            return TableForm(table.built, {"weight": stores["weight"]})
        width = table.built.store("weight").width + self.excess
        plan = self.plan(table.spec, width)
        best = table.stores()["gates"][0].argsort(descending=True, stable=True)[:width].sort()
        columns = best.values
        projection = torch.eye(plan.embedding_dim)[:, columns]
        return TableForm(
            plan, {"weight": stores["weight"][:, columns].clone(), "projection": projection}
        )


def gated_plan(built: LookupPlan) -> LookupPlan:
    n, d = built.num_embeddings, built.embedding_dim
    return replace(
        built,
        stores=(Store("weight", n, d), Store("gates", 1, d)),
        probes=(Probe("weight", Digit(1, n)), Probe("gates", Digit(1, 1))),
        combine="mul",
        head=None,
    )


class Model(nn.Module):
    """Two tables and a layer."""

    def __init__(self, method: object, rows: tuple[int, ...] = (60, 40), budget: str = "40%"):
        super().__init__()
        self.budget = budget
        torch.manual_seed(0)
        tables = [ec.TableConfig(f"t{k}", count, 8) for k, count in enumerate(rows)]
        self.embeddings = ec.EmbeddingBagCollection(tables, method=method, budget=budget)
        self.embeddings.reset_parameters(0.3)
        self.layer = nn.Linear(8 * len(rows), 1)

    def forward(self, ids: Tensor) -> Tensor:
        features = {f"t{k}": column for k, column in enumerate(ids.unbind(1))}
        return self.layer(self.embeddings(features)).flatten()

    def table(self, number: int) -> ec.EmbeddingBag:
        bag = self.embeddings.embedding_bags[f"t{number}"]
        assert isinstance(bag, ec.EmbeddingBag)
        return bag


def batch(seed: int, model: Model, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.randint(0, bag.num_embeddings, (size,), generator=generator)
        for bag in model.embeddings.embedding_bags.values()
    ]
    ids = torch.stack(columns, 1)
    return ids, (ids[:, 0] % 3 == 0).float()


def new_optimizer(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    if fused:
        return make_optimizer(model, 0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adagrad(trained, lr=0.1)


def loss(model: Model, seed: int) -> Tensor:
    ids, label = batch(seed, model)
    return nn.functional.binary_cross_entropy_with_logits(model(ids), label)


def train(
    model: Model,
    optimizer: torch.optim.Optimizer,
    procedure: ec.TrainingProcedure,
    steps: range,
) -> None:
    """Steps of the present phase; the seed of a batch is its step."""
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        if procedure.phase is not None and procedure.phase.split == "validation":
            with procedure.validating():
                loss(model, 1000 + step).backward()
        procedure.step()


def score(model: Model) -> float:
    """Higher is better."""
    with torch.no_grad():
        return float(torch.exp(-sum(loss(model, seed) for seed in range(2000, 2004)) / 4))


def run(
    model: Model, fused: bool = True, steps: int = 6, resume_at: tuple[int, int] | None = None
) -> tuple[Model, ec.TrainingProcedure, torch.optim.Optimizer]:
    """All phases; ``resume_at`` (phase, step) goes on in a new model from the saved states."""
    procedure = ec.TrainingProcedure(model)
    number = 0
    while procedure.begin_phase(partial(score, model)) is not None:
        optimizer = new_optimizer(model, fused)
        procedure.attach(optimizer)
        stop = steps if resume_at is None or resume_at[0] != number else resume_at[1]
        train(model, optimizer, procedure, range(stop))
        if stop < steps:
            model, procedure, optimizer = resumed(model, procedure, optimizer, fused)
            train(model, optimizer, procedure, range(stop, steps))
        number += 1
    return model, procedure, optimizer


def resumed(
    model: Model, procedure: ec.TrainingProcedure, optimizer: torch.optim.Optimizer, fused: bool
) -> tuple[Model, ec.TrainingProcedure, torch.optim.Optimizer]:
    """The same in new objects, by their states alone."""
    import io

    file = io.BytesIO()
    torch.save([procedure.state_dict(), optimizer.state_dict(), model.state_dict()], file)
    file.seek(0)
    state, optimizer_state, weights = torch.load(file)
    tables = model.embeddings.embedding_bags.values()
    rows = tuple(bag.num_embeddings for bag in tables)
    new = Model(model.table(0).settings, rows, model.budget)
    again = ec.TrainingProcedure(new)
    again.load_state_dict(state)
    new_one = new_optimizer(new, fused)
    again.attach(new_one)
    new.load_state_dict(weights)
    new_one.load_state_dict(optimizer_state)
    return new, again, new_one


def assert_same(one: object, other: object) -> None:
    """Bit for bit, in nested states."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor) and torch.equal(one, other)
    elif isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple) and len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one == other
