"""Lookups whose backward pass updates the stores, instead of handing gradients to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Number of each optimizer in ``csrc/cpu/optimizers.h``.
OPTIMIZERS = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 2, "adam": 3}


@dataclass
class UpdateRule:
    """An optimizer and its settings; change ``lr`` between steps for a schedule.

    Attributes:
        name: a key of :data:`OPTIMIZERS`.
        lr: learning rate.
        eps: added to the denominator.
        weight_decay: added to the gradient of touched rows, times the row.
        betas: of Adam's moments.
    """

    name: str
    lr: float
    eps: float
    weight_decay: float
    betas: tuple[float, float]

    @property
    def num_states(self) -> int:
        """How many state tensors a store has."""
        return {"sgd": 0, "adam": 2}.get(self.name, 1)

    def new_states(self, store: Tensor) -> list[Tensor]:
        """Zero state for a (rows, width) store, float32; (rows, 1) for the row-wise form."""
        width = 1 if self.name == "rowwise_adagrad" else store.shape[1]
        shape = (store.shape[0], width)
        return [
            torch.zeros(shape, dtype=torch.float32, device=store.device)
            for _ in range(self.num_states)
        ]

    @torch.no_grad()
    def update(self, store: Tensor, gradient: Tensor, states: Sequence[Tensor], step: int) -> None:
        """The same update in torch: of the rows of a sparse gradient, or of all rows."""
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows = gradient.indices()[0]
            values, weights = gradient.values().float(), store[rows].float()
            picked = [state[rows] for state in states]
            self._step(weights, values, picked, step)
            store[rows] = weights.to(store.dtype)
            for state, part in zip(states, picked, strict=True):
                state[rows] = part
        else:
            weights = store.float()
            self._step(weights, gradient.float(), states, step)
            store.copy_(weights)

    def _step(self, weights: Tensor, gradient: Tensor, states: Sequence[Tensor], step: int) -> None:
        """Change weights and states in place."""
        gradient = gradient + self.weight_decay * weights
        if self.name == "sgd":
            weights -= self.lr * gradient
        elif self.name == "adagrad":
            states[0].add_(gradient * gradient)
            weights -= self.lr * gradient / (states[0].sqrt() + self.eps)
        elif self.name == "rowwise_adagrad":
            states[0].add_((gradient * gradient).mean(dim=1, keepdim=True))
            weights -= self.lr * gradient / (states[0].sqrt() + self.eps)
        else:
            first, second = states
            beta1, beta2 = self.betas
            first.add_((1 - beta1) * (gradient - first))
            second.add_((1 - beta2) * (gradient * gradient - second))
            scaled = self.lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
            weights -= scaled * first / (second.sqrt() + self.eps)


@dataclass(frozen=True)
class FusedStores:
    """The stores that one backward pass updates.

    Attributes:
        rule: how.
        wanted: positions of the stores in the operator's list.
        first, second: state of each; empty tensors where the rule has none.
        anchor: a scalar that requires a gradient, so that there is a backward pass.
        steps: int64 counters of each table, one a store; all are raised by one.
    """

    rule: UpdateRule
    wanted: list[int]
    first: list[Tensor]
    second: list[Tensor]
    anchor: Tensor
    steps: list[Tensor]


class FusedLookup(torch.autograd.Function):
    """``embcompress::lookup`` whose backward is ``embcompress::lookup_backward_update``."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        weights: Tensor | None,
        fused: FusedStores,
        arguments: tuple[Any, ...],
    ) -> Tensor:
        stores, ids, offsets, _, encoding, ends_are_given, *shape = arguments
        ctx.fused, ctx.stores, ctx.ends_are_given = fused, stores, ends_are_given
        ctx.save_for_backward(ids, offsets, weights, encoding)
        return torch.ops.embcompress.lookup_forward(
            stores, ids, offsets, weights, encoding, ends_are_given, *shape
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ids, offsets, weights, encoding = ctx.saved_tensors
        fused, rule = ctx.fused, ctx.fused.rule
        gradient = gradients[0].contiguous()
        arguments = (gradient, ctx.stores, ids, offsets, weights, encoding, ctx.ends_are_given)
        weights_gradient = None
        if ctx.needs_input_grad[1]:  # before the rows move
            weights_gradient = torch.ops.embcompress.lookup_backward_weights(*arguments)
            weights_gradient = weights_gradient.to(weights.dtype)
        for step in fused.steps:
            step += 1
        torch.ops.embcompress.lookup_backward_update(
            *arguments,
            fused.wanted,
            fused.first,
            fused.second,
            OPTIMIZERS[rule.name],
            rule.lr,
            rule.eps,
            rule.weight_decay,
            *rule.betas,
            int(fused.steps[0][0]),
        )
        return None, weights_gradient, None, None
