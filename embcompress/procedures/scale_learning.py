"""Steps of quantized rows that are learned after the rows have moved (ALPT)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from embcompress.engine.quantization import code_positions, dequantize
from embcompress.plan import Linear
from embcompress.procedures.base import Observes, TableProcedure, TrainedTable
from embcompress.procedures.stochastic_rounding import round_stochastically, uniform_numbers

WEIGHT, SCALE = "weight", "scale"
GRADIENTS, TOUCHED, OCCURRENCES = "gradients", "touched", "occurrences"
MEAN, SQUARES = "mean", "squares"
_DECAYS = (0.9, 0.999)
_EPSILON = 1e-12


class ScaleLearningSettings(Protocol):
    """How steps are learned; see :class:`embcompress.Alpt`."""

    @property
    def scale_rate(self) -> float: ...
    @property
    def rounding_seed(self) -> int: ...


def step_gradients(
    gradients: Tensor, positions: Tensor, codes: Tensor, bits: int, occurrences: Tensor
) -> Tensor:
    """(N, width) what every number adds to the gradient of its row's step.

    Args:
        gradients: (N, width) of the rows' values.
        positions: (N, width) of the latents among the codes, not clamped.
        codes: (N, width) nearest to them.
        bits: of a code.
        occurrences: of ids in the batch, B of the paper's 1/√(B·d·(2^(b−1) − 1)).
    """
    middle = (2**bits - 1) / 2
    inside = (positions - codes).abs() <= 0.5
    of_step = torch.where(inside, codes - positions, codes - middle)
    numbers = occurrences * gradients.shape[1] * (2 ** (bits - 1) - 1)
    return gradients * of_step / numbers.sqrt()


class ScaleLearning(TableProcedure):
    """The second half of ALPT's step: first the rows move, then their steps, then rows are codes.

    The optimizer moves the latents. The batch's gradient of each row's values, kept from the
    backward pass, then meets the derivative of the values at the *moved* latents by their step
    (straight-through, Li 2022, equation 7): codes − positions inside of the codes, the outermost
    code outside. Steps follow in Adam, in their logarithm, and the rows that were read are rounded
    stochastically to codes of the new steps; other rows that share a step keep their values as
    nearly as the new codes allow. Steps in a 16-bit dtype miss changes below its last bit.

    Its tensors, beside Adam's two for every step: ``gradients``, (rows, width) float32, of this
    step's batch; ``touched`` and ``occurrences``, what was read.
    """

    observes: Observes = "gradients of vectors"
    averaged = (GRADIENTS, TOUCHED, OCCURRENCES)

    def __init__(self, settings: ScaleLearningSettings) -> None:
        self.settings = settings

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        store, scale = table.plan.store(WEIGHT), table.stores()[SCALE].detach()
        return {
            GRADIENTS: torch.zeros(store.rows, store.width, device=scale.device),
            TOUCHED: torch.zeros(store.rows, device=scale.device),
            OCCURRENCES: torch.zeros((), device=scale.device),
            MEAN: torch.zeros_like(scale, dtype=torch.float32),
            SQUARES: torch.zeros_like(scale, dtype=torch.float32),
        }

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        head = table.plan.head
        gradients = torch.nan_to_num(amounts.float(), nan=0.0, posinf=0.0, neginf=0.0)
        if isinstance(head, Linear):
            gradients = gradients @ table.stores()[head.weight].float()
        table.tensor(GRADIENTS).index_add_(0, ids, gradients)
        table.tensor(TOUCHED)[ids] = 1
        table.tensor(OCCURRENCES).add_(len(ids))

    def is_due(self, number: int) -> bool:
        return True

    def step(self, table: TrainedTable, number: int) -> None:
        stores, touched = table.stores(), table.tensor(TOUCHED)
        rows = touched.nonzero().flatten()
        if rows.numel():
            self._learn_steps(table, rows, number)
        store, latents = table.plan.store(WEIGHT), stores[WEIGHT]
        own = _own(stores[SCALE], rows).float()
        positions = code_positions(latents[rows].float(), own, None, store.bits)
        uniform = uniform_numbers(self.settings.rounding_seed, number, rows, store.width)
        codes = round_stochastically(positions, uniform)
        latents[rows] = dequantize(codes, own, None, store.bits).to(latents.dtype)
        touched[rows] = 0
        table.tensor(GRADIENTS)[rows] = 0
        table.tensor(OCCURRENCES).zero_()

    def _learn_steps(self, table: TrainedTable, rows: Tensor, number: int) -> None:
        scale = table.stores()[SCALE]
        places = rows if scale.shape[0] > 1 else slice(None)
        own = scale[places].float()
        gradients = self._scale_gradients(table, own, rows)
        # Adam of the logarithm, whose gradient is the step times its own.
        slope = own * gradients.sum_to_size(own.shape)
        mean, squares = table.tensor(MEAN), table.tensor(SQUARES)
        mean[places] = _DECAYS[0] * mean[places] + (1 - _DECAYS[0]) * slope
        squares[places] = _DECAYS[1] * squares[places] + (1 - _DECAYS[1]) * slope.square()
        first = mean[places] / (1 - _DECAYS[0] ** number)
        second = squares[places] / (1 - _DECAYS[1] ** number)
        change = -self.settings.scale_rate * first / (second.sqrt() + _EPSILON)
        scale[places] = (own * change.exp()).to(scale.dtype)

    @staticmethod
    def _scale_gradients(table: TrainedTable, own: Tensor, rows: Tensor) -> Tensor:
        store, latents = table.plan.store(WEIGHT), table.stores()[WEIGHT][rows].float()
        positions = latents / own + (2**store.bits - 1) / 2
        codes = positions.round().clamp(0, 2**store.bits - 1)
        return step_gradients(
            table.tensor(GRADIENTS)[rows], positions, codes, store.bits, table.tensor(OCCURRENCES)
        )


def _own(scale: Tensor, rows: Tensor) -> Tensor:
    """The steps of some rows, or those that all share."""
    return scale[rows] if scale.shape[0] > 1 else scale
