"""What a sweep is: its settings and the runs that follow from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from embcompress.budget import parse_budget
from embcompress.methods import method_class
from embcompress.models import MODELS
from embcompress.training.recipe import TABLE_STD

FULL_BUDGET = "100%"
SPLITS = ("random", "time", "day", "prequential")


@dataclass(frozen=True)
class TrainingSettings:
    """How every run is trained; the same for all methods.

    Attributes:
        model: name of the reference model.
        split: ``"random"``, ``"time"``, ``"day"`` (in time, by whole days), or ``"prequential"``:
            one pass in time order, in which every batch is predicted before it is trained on.
        validation, test: shares of the rows. Of a prequential run these are the predictions that
            are compared; what comes before them is what may be known of the data beforehand.
        embedding_dim: width of every table.
        epochs: passes over the training rows at most.
        patience: stop after so many epochs without a better validation AUC.
        batch_size: rows a step.
        learning_rates: every run tries them all, and keeps what its validation rows say is best.
        table_std: standard deviation of the vectors at the start.
    """

    model: str = "dlrm"
    split: str = "random"
    validation: float = 0.1
    test: float = 0.15
    embedding_dim: int = 16
    epochs: int = 8
    patience: int = 2
    batch_size: int = 512
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    table_std: float = TABLE_STD

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"unknown model {self.model!r}; known models: {', '.join(MODELS)}")
        for name in ("embedding_dim", "epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates must be positive, got {self.learning_rates}")


@dataclass(frozen=True)
class Run:
    """One training: what is on its record's key."""

    data: str
    method: str
    budget: str
    seed: int
    training: TrainingSettings

    @property
    def key(self) -> str:
        """Identifies the run among all records."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def cell(self) -> tuple[str, str, str]:
        """What the seeds are averaged over."""
        return self.data, self.method, self.budget


@dataclass(frozen=True)
class SweepSettings:
    """Data × methods × budgets × seeds.

    Attributes:
        data: specs of click logs (see :func:`embcompress.data.load_click_log`).
        methods: names from the registry; ``"full"`` runs once a seed, at 100 %.
        budgets: shares or bytes for all tables together.
        seeds: of the split, the start values, the order of the rows and the hash keys.
        threads: of torch inside an operator. The models here are small: more threads gain next
            to nothing on an idle machine, and wait for each other on a busy one. Not a part of
            a run's key.
        workers: processes that runs are shared out to. Not a part of a run's key.
        plan_seconds: for a method that chooses its settings by short trainings, after so long it
            begins no further one. Not a part of a run's key.
    """

    data: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    training: TrainingSettings = TrainingSettings()
    threads: int = 1
    plan_seconds: float = 100.0
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "methods", "budgets", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be distinct and not empty, got {list(values)}")
        if not self.plan_seconds > 0:
            raise ValueError(f"plan_seconds must be positive, got {self.plan_seconds}")
        for name in ("threads", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for method in self.methods:
            method_class(method)  # raises ValueError naming the methods there are
        for budget in self.budgets:
            parse_budget(budget, 1 << 40)  # raises ValueError before anything is trained

    def runs(self) -> Iterator[Run]:
        """Every run, the seeds of a cell one after another."""
        for data in self.data:
            for method in self.methods:
                for budget in (FULL_BUDGET,) if method == "full" else self.budgets:
                    for seed in self.seeds:
                        yield Run(data, method, budget, seed, self.training)


def jsonable(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    return json.loads(json.dumps(value))
