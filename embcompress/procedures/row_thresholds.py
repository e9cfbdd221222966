"""Thresholds of row norms that are learned while a gated table trains."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from embcompress.procedures.base import Observes, TableProcedure, TrainedTable
from embcompress.procedures.gated_table import COLUMNS, ROWS, WEIGHT, generator_of, up_to

THRESHOLD, GRADIENT = "threshold", "gradient"


class RowThresholdSettings(Protocol):
    """How thresholds are learned; see :class:`embcompress.OptEmbed`."""

    @property
    def rate(self) -> float: ...
    @property
    def pressure(self) -> float: ...


class RowThresholds(TableProcedure):
    """Learns the norm below which a row is taken for zero, under changing widths.

    A row is read where its norm ‖E[x]‖₁ is above the threshold t of the table. The step function
    has no gradient; in its place stands that of a long-tailed hat, :func:`step_slope`. So

        dt = Σ over occurrences of −slope(‖E[x]‖₁ − t)·⟨gradient of the vector, g ⊙ E[x]⟩ − λ·e^{−t}

    and t makes a step of gradient descent after every batch. The last term is the slope of
    λ·e^{−t}, the pressure to prune. For every batch only the first columns are open, a number that
    is drawn evenly from 1 to d, so that the table can do with any width afterwards.

    Its tensors: ``threshold``, (1,); ``gradient``, (1,) since the last step, without pressure.
    """

    observes: Observes = "gradients of vectors"
    averaged = (GRADIENT,)

    def __init__(self, settings: RowThresholdSettings) -> None:
        self.settings = settings

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        new = torch.zeros_like(table.stores()[COLUMNS][0, :1], dtype=torch.float32)
        self._open(table, new, 0)
        return {THRESHOLD: new, GRADIENT: new.clone()}

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        stores = table.stores()
        rows = stores[WEIGHT].detach()[ids].float()
        of_gates = torch.nan_to_num((amounts * rows * stores[COLUMNS][0]).sum(1), 0.0, 0.0, 0.0)
        slope = step_slope(rows.abs().sum(1) - table.tensor(THRESHOLD))
        table.tensor(GRADIENT).sub_((slope * of_gates).sum())

    def is_due(self, number: int) -> bool:
        return True

    def step(self, table: TrainedTable, number: int) -> None:
        threshold, gradient = table.tensor(THRESHOLD), table.tensor(GRADIENT)
        pressure = self.settings.pressure * torch.exp(-threshold)
        threshold.sub_(self.settings.rate * (gradient - pressure))
        gradient.zero_()
        self._open(table, threshold, number)

    @staticmethod
    def _open(table: TrainedTable, threshold: Tensor, number: int) -> None:
        """Write the gates for the batch after the step of that number."""
        stores = table.stores()
        columns, rows = stores[COLUMNS], stores[ROWS]
        count = columns.shape[1]
        width = int(torch.randint(1, count + 1, (), generator=generator_of(table.spec, number)))
        columns.copy_(up_to(width, count, columns)[None])
        rows.copy_((row_norms(stores[WEIGHT]) > threshold)[:, None])


def row_norms(weight: Tensor) -> Tensor:
    """(rows,) float32: the sum of the magnitudes of each row."""
    return weight.detach().float().abs().sum(1)


def step_slope(distance: Tensor) -> Tensor:
    """What stands for the derivative of the step function: 2 − 4·|x|, then 0.4, and 0 beyond 1.

    Source: Xu & Cheung, "Accurate and compact convolutional neural networks with trained
    binarization", 2019, as used by Liu et al., "Dynamic sparse training", ICLR 2020.
    """
    far = distance.abs()
    slope = torch.where(far <= 0.4, 2 - 4 * far, torch.full_like(far, 0.4))
    return torch.where(far > 1, torch.zeros_like(far), slope)
