"""Learned steps that an optimizer moves no further, for their size, than the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from embcompress.procedures.base import TableProcedure, TrainedTable

BEFORE = "step_before"


class StepDamping(TableProcedure):
    """Takes back most of what an optimizer has moved the steps of a quantized store.

    An optimizer that divides gradients by their size, as Adagrad and Adam do, moves every number
    by about its learning rate: a step of 8 bits by many times itself. Rows are outside of the codes
    then, where no gradient reaches them, and stay there. So of a change Δ of a step s between codes
    of b bits this leaves ::

        s <- s + clamp(2·Δ / (2^b − 1), −s/2, s/2)

    The outermost code, (2^b − 1)/2 steps from the middle, so moves by Δ, as the latents do. Biases
    are as large as latents, and are left alone. So are steps whose optimizer keeps no state: with
    plain SGD the damped gradients keep the proportion (Esser et al., "Learned step size
    quantization", ICLR 2020, section 2.2; :func:`embcompress.engine.quantization.gradient_scale`),
    which they cannot where they are divided by their own size.

    Its tensor: ``step_before``, the steps after the last change, float32. Load weights before the
    :class:`~embcompress.TrainingProcedure` is made, or its state after them.

    Args:
        store: name of the quantized store; its steps are shared by all rows, so that this costs
            nothing that grows with the table.
    """

    def __init__(self, store: str) -> None:
        self.store = store

    def _scale(self, table: TrainedTable) -> str:
        quantization = table.plan.store(self.store).quantization
        assert quantization is not None and quantization.trained
        return quantization.scale

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        return {BEFORE: table.stores()[self._scale(table)].detach().float().clone()}

    def is_due(self, number: int) -> bool:
        return True

    def step(self, table: TrainedTable, number: int) -> None:
        name = self._scale(table)
        scale, before = table.stores()[name], table.tensor(BEFORE)
        if table.row_states(name):
            codes = 2 ** table.plan.store(self.store).bits
            most = before.abs() / 2
            change = (scale.float() - before) * (2 / (codes - 1))
            scale.copy_(before + torch.clamp(change, -most, most))
        before.copy_(scale)
