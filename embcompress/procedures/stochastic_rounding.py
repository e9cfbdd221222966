"""Stochastic rounding: numbers become codes up or down by chance, right on average."""

from __future__ import annotations

import torch
from torch import Tensor

from embcompress.engine.hashing import hash_bucket
from embcompress.engine.quantization import code_positions, dequantize
from embcompress.hashing import derive_key
from embcompress.layouts.latents import quantization_parts
from embcompress.procedures.base import Observes, TableProcedure, TrainedTable
from embcompress.procedures.step_damping import StepDamping

TOUCHED = "touched"
_FRACTIONS = 1 << 24  # that a uniform number may have; float32 holds them exactly


def uniform_numbers(seed: int, step: int, rows: Tensor, width: int) -> Tensor:
    """(N, width) float32 numbers in [0, 1) for some rows of a table at one step.

    They are a hash of seed, step, row and column, so they do not depend on which other rows there
    are, on the device, or on the number of threads.
    """
    positions = rows[:, None] * width + torch.arange(width, device=rows.device)
    key = derive_key(seed, "rounding", step)
    return hash_bucket(positions, key, _FRACTIONS).float() / _FRACTIONS


def round_stochastically(positions: Tensor, uniform: Tensor) -> Tensor:
    """The code above with the probability of the position's fraction, else the one below."""
    below = positions.floor()
    return below + (uniform < positions - below)


class StochasticRounding(TableProcedure):
    """Low-precision training: after every step the rows that it read are codes again.

    A latent that the optimizer has moved to the position x between two codes becomes ⌊x⌋ + 1 with
    probability x − ⌊x⌋ and ⌊x⌋ otherwise. Updates far smaller than a step of the codes so add up
    on average, and rows hold nothing that their codes do not. An optimizer that moves rows without
    gradients (momentum) leaves those as they are until a batch reads them.

    Its tensor: ``touched``, (num_embeddings,) float32, which ids were read since the last step.

    Source: Gupta et al., "Deep learning with limited numerical precision", ICML 2015, section 3.1.

    Args:
        store: name of the quantized store, whose row i is id i.
        seed: of the chances.
        damping: of the store's steps, which comes before the rows become codes of them, or None.
    """

    observes: Observes = "ids"
    averaged = (TOUCHED,)

    def __init__(self, store: str, seed: int, damping: StepDamping | None = None) -> None:
        self.store, self.seed, self.damping = store, seed, damping

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        device = table.stores()[self.store].device
        tensors = {} if self.damping is None else self.damping.new_tensors(table)
        return {TOUCHED: torch.zeros(table.plan.num_embeddings, device=device), **tensors}

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        table.tensor(TOUCHED)[ids] = 1

    def is_due(self, number: int) -> bool:
        return True

    def step(self, table: TrainedTable, number: int) -> None:
        if self.damping is not None:
            self.damping.step(table, number)
        stores, touched = table.stores(), table.tensor(TOUCHED)
        store, latents = table.plan.store(self.store), stores[self.store]
        rows = touched.nonzero().flatten()
        scale, bias = quantization_parts(table.plan, store, stores, rows)
        positions = code_positions(latents[rows].float(), scale, bias, store.bits)
        uniform = uniform_numbers(self.seed, number, rows, store.width)
        codes = round_stochastically(positions, uniform)
        latents[rows] = dequantize(codes, scale, bias, store.bits).to(latents.dtype)
        touched[rows] = 0
