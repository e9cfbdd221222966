"""What a method does with one table between optimizer steps: the protocol.

A method that changes codes or moves rows while a model trains (pruning, promotion of hot ids,
re-clustering) returns a :class:`TableProcedure` from :meth:`~embcompress.Method.procedure`;
:class:`~embcompress.TrainingProcedure` finds the tables, feeds the procedures and ties them to the
optimizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from embcompress.plan import LookupPlan

if TYPE_CHECKING:
    from embcompress.methods.base import TableSpec

#: What a procedure wants to see of every batch: nothing, the ids, the norms of their gradients, or
#: these gradients themselves.
Observes = Literal["nothing", "ids", "gradients", "gradients of vectors"]


@dataclass(frozen=True)
class RowState:
    """A tensor of optimizer state whose row i belongs to row i of a store.

    Attributes:
        tensor: (rows, …); change it in place.
        fresh: the value that it has for a row that was never updated.
    """

    tensor: Tensor
    fresh: float


class TrainedTable(Protocol):
    """What a procedure sees of its table; nothing of it is to be kept between steps."""

    @property
    def plan(self) -> LookupPlan:
        """The plan; its rows and codes may be changed, the plan itself only by take_keys."""
        ...

    def take_keys(self, plan: LookupPlan) -> None:
        """Hash with the keys of a plan that differs in these alone; the method ``renews_keys``."""
        ...

    @property
    def spec(self) -> TableSpec:
        """The table that the plan stands for: its shape and, where the method has phases, its name,
        seed and counts.
        """
        ...

    @property
    def built(self) -> LookupPlan:
        """The plan that the table was built with, under its budget."""
        ...

    def stores(self) -> dict[str, Tensor]:
        """The stores by name; change them in place, under :func:`torch.no_grad`."""
        ...

    def row_states(self, store: str) -> list[RowState]:
        """The optimizers' state of a store: whoever moves its rows moves this too."""
        ...

    def learning_rate(self, store: str) -> float:
        """The rate at which the store is trained at present.

        Raises:
            ValueError: nothing that is known of trains it.
        """
        ...

    def tensor(self, name: str) -> Tensor:
        """A tensor of the procedure's own, on the table's device."""
        ...


class TableProcedure(ABC):
    """The work on one table.

    The tensors that it needs from step to step are named by :meth:`new_tensors`. They are kept in
    the table as buffers outside its ``state_dict``, so they move with it and are counted as
    ``memory().training``; :meth:`TrainingProcedure.state_dict
    <embcompress.TrainingProcedure.state_dict>` saves them.
    """

    #: What :meth:`observe` is given.
    observes: Observes = "nothing"
    #: Names of tensors that are averaged over data-parallel processes before a step.
    averaged: tuple[str, ...] = ()
    #: Names of tensors that all data-parallel processes take from the first before a step: those
    #: that no average makes sense of. The first sees a share of the examples like any other.
    from_first: tuple[str, ...] = ()

    @abstractmethod
    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        """The tensors that it keeps, at their start values."""

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        """See one batch: once in the forward pass, or once in the backward pass.

        Args:
            table: the table.
            ids: (N,) every occurrence of an id in the batch.
            amounts: (N,) float: 1 for every id, or the norm of the gradient of the occurrence's
                vector; or (N, embedding_dim) float: that gradient. 0 for the padding id.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it observes {self.observes}")

    @abstractmethod
    def is_due(self, number: int) -> bool:
        """Whether there is something to do after the optimizer's step of that number (from 1)."""

    @abstractmethod
    def step(self, table: TrainedTable, number: int) -> None:
        """Do it; the same observations, stores and number must give the same result."""
