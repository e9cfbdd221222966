"""Lookups whose backward pass updates the stores, instead of handing gradients to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embcompress.engine import ops
from embcompress.engine.file_tensors import zeros_beside

#: Number of each optimizer in ``csrc/optimizer.h``.
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
        in_kernel: whether the backward pass of the kernels updates; else gradients come first, and
            torch updates. One answer for all tables that are fused together, since a collection
            runs them in one call.
        settings: (5,) float64, these numbers in this order: what the operators read, so that a
            new rate is no new graph for a compiler.
        anchor: a scalar that requires a gradient, so that there is a backward pass.
    """

    name: str
    lr: float
    eps: float
    weight_decay: float
    betas: tuple[float, float]
    in_kernel: bool = True

    def __post_init__(self) -> None:
        self.settings = torch.empty(5, dtype=torch.float64, device="cpu")
        self.anchor = torch.zeros((), device="cpu", requires_grad=True)
        self._write_settings()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("lr", "eps", "weight_decay", "betas") and hasattr(self, "settings"):
            self._write_settings()

    def _write_settings(self) -> None:
        numbers = [self.lr, self.eps, self.weight_decay, *self.betas]
        self.settings.copy_(torch.tensor(numbers, dtype=torch.float64, device="cpu"))

    @property
    def num_states(self) -> int:
        """How many state tensors a store has."""
        return {"sgd": 0, "adam": 2}.get(self.name, 1)

    def new_states(self, store: Tensor) -> list[Tensor]:
        """Zero state for a (rows, width) store: the (1,) int64 number of steps, on the CPU, and
        float32 state of the store's shape, or (rows, 1) for the row-wise form. State of rows in a
        file is in a file, too.
        """
        width = 1 if self.name == "rowwise_adagrad" else store.shape[1]
        shape = (store.shape[0], width)
        states = [zeros_beside(store, shape, torch.float32) for _ in range(self.num_states)]
        return [torch.zeros(1, dtype=torch.int64, device="cpu"), *states]

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
        first, second: state of each; empty lists where the rule has none.
        steps: (1,) int64 of each, how often it was updated; raised by the update.
    """

    rule: UpdateRule
    wanted: list[int]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]

    def arguments(self) -> tuple[Any, ...]:
        """The last arguments of the operators."""
        rule = self.rule
        kind = OPTIMIZERS[rule.name]
        return self.wanted, self.first, self.second, self.steps, rule.settings, kind


def lookup_fused(fused: FusedStores, inputs: tuple[Any, ...]) -> Tensor:
    """``embcompress::lookup_fused``, by the cheapest way that the situation allows.

    Args:
        fused: what the backward pass updates.
        inputs: arguments of ``embcompress::lookup``.
    """
    if torch.compiler.is_compiling():
        *inputs_, _ = inputs
        return torch.ops.embcompress.lookup_fused(fused.rule.anchor, *inputs_, *fused.arguments())
    return FusedLookup.apply(fused.rule.anchor, inputs[3], fused, inputs)


class FusedLookup(torch.autograd.Function):
    """``embcompress::lookup_forward`` whose backward updates the stores."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        weights: Tensor | None,
        fused: FusedStores,
        inputs: tuple[Any, ...],
    ) -> Tensor:
        stores, ids, offsets, _, encoding, ends_are_given, *shape = inputs
        # The stores are not saved: that they change before a second backward pass is no mistake.
        ctx.save_for_backward(ids, offsets, weights, encoding)
        ctx.stores, ctx.ends_are_given, ctx.update = stores, ends_are_given, fused.arguments()
        return torch.ops.embcompress.lookup_forward(
            stores, ids, offsets, weights, encoding, ends_are_given, *shape
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, _update(ctx, gradients[0], ctx.needs_input_grad[1]), None, None


def _update(ctx: Any, gradient: Tensor, weights_are_wanted: bool) -> Tensor | None:
    """Update the stores; the gradient of the per-sample weights."""
    ids, offsets, weights, encoding = ctx.saved_tensors
    arguments = (
        gradient.contiguous(), ctx.stores, ids, offsets, weights, encoding, ctx.ends_are_given,
    )  # fmt: skip
    weights_gradient = None
    if weights_are_wanted:  # before the rows move
        weights_gradient = torch.ops.embcompress.lookup_backward_weights(*arguments)
        weights_gradient = weights_gradient.to(weights.dtype)
    torch.ops.embcompress.lookup_backward_update(*arguments, *ctx.update)
    return weights_gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, stores, ids, offsets, weights, encoding, ends_are_given, _, _, *update = inputs
    ctx.save_for_backward(ids, offsets, weights, encoding)
    ctx.stores, ctx.ends_are_given, ctx.update = stores, ends_are_given, update


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    weights_gradient = _update(ctx, gradient, ctx.needs_input_grad[4])
    _, first, second, steps, _, _ = ctx.update
    nothing = [[None] * len(tensors) for tensors in (ctx.stores, first, second, steps)]
    return (
        None, nothing[0], None, None, weights_gradient, None, None, None, None, None,
        *nothing[1:], None, None,
    )  # fmt: skip


if ops.is_available():
    torch.library.register_autograd(
        "embcompress::lookup_fused", _backward, setup_context=_setup_context
    )
