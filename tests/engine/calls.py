"""A call of every operator, whose arguments tests damage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from embcompress.engine.encoding import encode_plans
from embcompress.engine.fused import OPTIMIZERS
from embcompress.plan import (
    Code,
    Digit,
    Hash,
    LookupPlan,
    Probe,
    Quantization,
    Store,
    Weight,
)

#: Every kind of address and store, codes of rows and of scales. Float stores come first.
PLAN = LookupPlan(
    1000,
    11,
    stores=(
        Store("rows", 50, 4),
        Store("steps", 40, 1),
        Store("lows", 40, 1),
        Store("scales", 9, 2),
        Store("packed", 40, 7, "uint4", Quantization("steps", "lows")),
        Store("codes", 100, 3, "uint6"),
        Store("others", 30, 2, "uint7"),
    ),
    probes=(
        Probe("rows", Hash(5, 45), Weight("scales", Digit(3, 9), column=1), offset=5),
        Probe(
            "packed",
            Code("codes", 40, Digit(10, 100), 1, Code("others", 40, Hash(6, 30))),
            Weight("scales", Code("codes", 9, Digit(10, 100), 2, Code("others", 9, Hash(4, 30)))),
        ),
    ),
    combine="concat",
    pool="sum",
    padding_idx=7,
)
NUM_FLOATS = 4


@dataclass
class Call:
    """Arguments of the operators: three bags for each of two features that share all stores."""

    stores: list[Tensor]
    ids: Any
    offsets: Any
    weights: Any
    encoding: Tensor
    ends_are_given: bool = True
    num_features: int = 2
    num_columns: int = 22

    @property
    def bags(self) -> list[Any]:
        return [
            self.stores, self.ids, self.offsets, self.weights, self.encoding, self.ends_are_given,
        ]  # fmt: skip

    def forward(self) -> Tensor:
        return torch.ops.embcompress.lookup(*self.bags, self.num_features, self.num_columns, False)

    def grad(self) -> Tensor:
        rows = 1 if self.offsets is None else self.offsets.numel() // self.num_features
        return torch.ones(rows, self.num_columns)

    def backward(self, grad: Tensor | None = None, wanted: Any = (0, 1, 2, 3)) -> Any:
        grad = self.grad() if grad is None else grad
        return torch.ops.embcompress.lookup_backward(grad, *self.bags, wanted)

    def backward_sparse(self, grad: Tensor | None = None, wanted: Any = (0, 1, 2, 3)) -> Any:
        grad = self.grad() if grad is None else grad
        return torch.ops.embcompress.lookup_backward_sparse(grad, *self.bags, wanted)

    def backward_weights(self, grad: Tensor | None = None) -> Tensor:
        grad = self.grad() if grad is None else grad
        return torch.ops.embcompress.lookup_backward_weights(grad, *self.bags)

    def update(self, grad: Tensor | None = None, wanted: Any = (0, 1, 2, 3), **other: Any) -> None:
        grad = self.grad() if grad is None else grad
        states = [torch.zeros_like(store) for store in self.stores[:NUM_FLOATS]]
        arguments = {
            "first": states,
            "second": [state.clone() for state in states],
            "steps": [torch.zeros(1, dtype=torch.int64) for _ in states],
            "settings": torch.tensor([0.1, 1e-8, 0.0, 0.9, 0.999], dtype=torch.float64),
            "kind": OPTIMIZERS["adam"],
        } | other
        torch.ops.embcompress.lookup_backward_update(grad, *self.bags, wanted, *arguments.values())

    def refused(self, match: str) -> None:
        """Every operator refuses these arguments."""
        for operator in (
            self.forward, self.backward, self.backward_sparse, self.backward_weights, self.update,
        ):  # fmt: skip
            with pytest.raises((RuntimeError, TypeError), match=match):
                operator()


def make_call() -> Call:
    generator = torch.Generator().manual_seed(0)
    floats = [torch.rand(s.rows, s.width, generator=generator) for s in PLAN.stores if s.is_float]
    packed = [
        torch.randint(0, 256, (s.bytes,), generator=generator).byte()
        for s in PLAN.stores
        if not s.is_float
    ]
    ids = torch.randint(0, 1000, (12,), generator=generator)
    numbers = {store.name: number for number, store in enumerate(PLAN.stores)}
    encoded = encode_plans([PLAN, PLAN], [numbers, numbers])
    offsets = torch.tensor([0, 2, 2, 5, 6, 9, 12])
    weights = torch.rand(12, generator=generator)
    return Call([*floats, *packed], ids, offsets, weights, encoded.tensor)


def run_everything(call: Call) -> None:
    call.forward()
    call.backward()
    call.backward_sparse()
    call.backward_weights()
    call.update()
