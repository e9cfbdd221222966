"""How models with compressed tables are trained here, alike for all methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embcompress.modules import CompressedTable
from embcompress.optimizers import fuse_optimizer, unfused_parameters


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Adagrad, for tables and layers alike.

    For compressed tables it is fused into the backward pass, where a step costs what its batch
    costs.

    Args:
        model: with compressed tables, or without.
        learning_rate: of both.

    Returns:
        The optimizer of all other parameters.
    """
    if any(isinstance(module, CompressedTable) for module in model.modules()):
        fuse_optimizer(model, "adagrad", lr=learning_rate)
    return torch.optim.Adagrad(unfused_parameters(model), lr=learning_rate)


def binary_step(optimizer: torch.optim.Optimizer, logits: Tensor, label: Tensor) -> None:
    """One step of the log-loss of clicks, from the logits of a batch."""
    optimizer.zero_grad(set_to_none=True)
    nn.functional.binary_cross_entropy_with_logits(logits, label).backward()
    optimizer.step()
