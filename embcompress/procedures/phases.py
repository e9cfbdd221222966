"""Phases: the procedure of a method that searches or prunes first, as a list that one loop runs.

A method says by :meth:`embcompress.Method.phases` in which stages its tables are trained, and by
:meth:`embcompress.Method.begin_phase` what they become at the start of each;
:class:`embcompress.TrainingProcedure` carries it out. See ``docs/phases.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from embcompress.plan import LookupPlan
from embcompress.procedures.base import TrainedTable

#: Quality of the model as it is, on validation examples; higher is better.
Score = Callable[[], float]


@dataclass(frozen=True)
class Phase:
    """One stage of training.

    Attributes:
        name: in records and messages, and by which a method knows it.
        epochs: passes over the training examples; None: until the validation score stops rising,
            for the last phase alone.
        weights: what the layers around the tables start from: they ``"keep"`` what they have
            learned, or get the ``"initial"`` weights that they had before the first phase. What
            the tables start from is up to :meth:`embcompress.Method.begin_phase`.
        split: the examples that table procedures observe. ``"validation"``: after every training
            batch the loop runs one of validation examples, from which nothing but the procedures'
            own numbers learns.
    """

    name: str
    epochs: int | None = None
    weights: Literal["keep", "initial"] = "keep"
    split: Literal["training", "validation"] = "training"

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs of phase {self.name!r} must be at least 1, got {self.epochs}")
        if self.weights not in ("keep", "initial"):
            raise ValueError(f"weights must be 'keep' or 'initial', got {self.weights!r}")
        if self.split not in ("training", "validation"):
            raise ValueError(f"split must be 'training' or 'validation', got {self.split!r}")


#: Of methods that train in one go.
ONE_PHASE = (Phase("train"),)


@dataclass(frozen=True, eq=False)
class TableForm:
    """Another plan for a table, with its stores.

    Attributes:
        plan: without pooling; it need not keep to the budget before the last phase.
        stores: a tensor for every store of the plan: float ones (rows, width), also for quantized
            stores, whose latents they are, and packed codes (bytes,) uint8.
        frozen: names of float stores that the optimizer leaves alone, such as gates that a
            procedure writes.
    """

    plan: LookupPlan
    stores: Mapping[str, Tensor]
    frozen: tuple[str, ...] = ()


class PhasedTable(TrainedTable, Protocol):
    """What a method sees of a table at the start of a phase."""

    def new_stores(self, plan: LookupPlan) -> dict[str, Tensor]:
        """Stores of a plan at start values, codes zero.

        They depend on the table's name and seed, the plan and the deviation of its start values
        alone: the same call gives the same values in every phase, so initial weights need not be
        kept.
        """
        ...


def common_phases(phases: Mapping[str, tuple[Phase, ...]]) -> tuple[Phase, ...]:
    """The phases of a model, from those of its tables by name.

    Tables whose methods have one phase train in every phase of the others.

    Raises:
        ValueError: phases that contradict each other, or an open end before the last phase.
    """
    first: tuple[str, tuple[Phase, ...]] = ("", ONE_PHASE)
    for name, own in phases.items():
        _check(name, own)
        if len(own) == 1 or own == first[1]:
            continue
        if len(first[1]) > 1:
            raise ValueError(
                f"the tables {first[0]!r} and {name!r} are trained in different phases, "
                f"{_names(first[1])} and {_names(own)}; train them with one method, or one "
                "after the other"
            )
        first = name, own
    return first[1]


def _check(name: str, phases: tuple[Phase, ...]) -> None:
    if not phases:
        raise ValueError(f"the method of table {name!r} has no phase")
    names = [phase.name for phase in phases]
    if len(set(names)) != len(names):
        raise ValueError(f"the phases of table {name!r} must have distinct names, got {names}")
    for phase in phases[:-1]:
        if phase.epochs is None:
            raise ValueError(f"phase {phase.name!r} of table {name!r} needs a number of epochs")


def _names(phases: Iterable[Phase]) -> list[str]:
    return [
        phase.name if phase.epochs is None else f"{phase.name} × {phase.epochs}" for phase in phases
    ]
