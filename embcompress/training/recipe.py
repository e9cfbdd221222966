"""How models with compressed tables are trained here, alike for all methods.

Start values with one deviation of the vectors whatever makes them, one optimizer for tables and
layers, and the weights of the best epoch. Rows that ids share need no rate of their own: Adagrad
divides a row's step by the root of the sum of its squared gradients, so a row that takes the
gradients of many ids slows down by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from embcompress.optimizers import fuse_optimizer, unfused_parameters
from embcompress.tables.compressed_table import CompressedTable
from embcompress.training.training_procedure import TrainingProcedure

#: Standard deviation of the vectors of a new table.
TABLE_STD = 0.05


def initialize_tables(model: nn.Module, std: float = TABLE_STD) -> None:
    """Draw the stores of all compressed tables anew, so that vectors have this deviation.

    Random numbers come from torch's global generator.

    Raises:
        ValueError: std is not positive.
    """
    for module in model.modules():
        if isinstance(module, CompressedTable):
            module.reset_parameters(std)


def make_optimizer(
    model: nn.Module, learning_rate: float, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Adagrad, for tables and layers alike.

    For compressed tables it is fused into the backward pass, where a step costs what its batch
    costs.

    Args:
        model: with compressed tables, or without.
        learning_rate: of both.
        fused: update the layers by torch's fused kernel, which is faster and rounds otherwise.

    Returns:
        The optimizer of all other parameters.
    """
    if any(isinstance(module, CompressedTable) for module in model.modules()):
        fuse_optimizer(model, "adagrad", lr=learning_rate)
    # A group may be empty, as it is in a model of tables alone; a plain list may not.
    layers = [{"params": unfused_parameters(model)}]
    return torch.optim.Adagrad(layers, lr=learning_rate, fused=fused or None)


def binary_step(optimizer: torch.optim.Optimizer, logits: Tensor, label: Tensor) -> None:
    """One step of the log-loss of clicks, from the logits of a batch."""
    optimizer.zero_grad(set_to_none=True)
    nn.functional.binary_cross_entropy_with_logits(logits, label).backward()
    optimizer.step()


def validation_step(
    procedure: TrainingProcedure, logits: Callable[[], Tensor], label: Tensor
) -> None:
    """Show the methods' procedures the log-loss of validation examples; nothing else learns.

    Args:
        procedure: in a phase whose split is ``"validation"``.
        logits: computes those of the batch.
    """
    with procedure.validating():
        nn.functional.binary_cross_entropy_with_logits(logits(), label).backward()


@dataclass
class OverfittingGuard:
    """Keeps the weights of the best epoch, and says when to stop.

    Full tables of click models overfit from the second epoch on, compressed ones later, so neither
    one epoch nor a fixed number is fair to all.

    Attributes:
        patience: stop after so many epochs without a better score.
        scores: after each epoch, of validation examples; higher is better.
        states: weights after the first and after the best epoch, by epoch from 1.
    """

    patience: int
    scores: list[float] = field(default_factory=list)
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def best_epoch(self) -> int:
        """The epoch with the best score, the first of equal ones; 0 before the first."""
        return 1 + self.scores.index(max(self.scores)) if self.scores else 0

    def end_epoch(self, model: nn.Module, score: float) -> bool:
        """Take note of an epoch; returns whether to stop."""
        before = self.best_epoch
        self.scores.append(score)
        epoch = len(self.scores)
        if self.best_epoch == epoch:
            if before > 1:
                del self.states[before]
            state = model.state_dict()
            self.states[epoch] = {key: value.detach().clone() for key, value in state.items()}
        return epoch - self.best_epoch >= self.patience

    def restore(self, model: nn.Module, epoch: int | None = None) -> None:
        """Give the model the weights of an epoch, the best one by default."""
        # load_state_dict takes the plans out of its argument's copy, not out of the model.
        model.load_state_dict(self.states[self.best_epoch if epoch is None else epoch])
