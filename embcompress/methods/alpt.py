"""Rows in few bits with a learned step for every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import (
    Share,
    calibrate,
    check_finite,
    check_share,
    shape_of_steps,
)
from embcompress.approximation.fitting import principal_directions
from embcompress.layouts.latents import pack_latents
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.methods.narrow import NarrowRows
from embcompress.plan import Digit, Linear, LookupPlan, Probe, Quantization, Store
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.scale_learning import ScaleLearning

_BITS = (2, 4, 8)


@register
@dataclass(frozen=True)
class Alpt(NarrowRows):
    """Adaptive low-precision training, Δ[x]·E[x]: rows in a few bits, each with a learned step.

    A step of training is two: the optimizer moves the rows, then
    :class:`~embcompress.TrainingProcedure` moves the steps Δ by their gradient at the moved rows,
    times 1/√(B·d·(2^(b−1) − 1)) for a batch of B ids, and rounds the rows stochastically to codes
    (:class:`embcompress.procedures.scale_learning.ScaleLearning`). Without a procedure rows are
    float latents and steps stand still. Under a small budget rows are narrower, and a projection
    follows.

    Memory: n·w·b / 8 bytes and a number for each row (or column): 4·n bytes, as much as four
    numbers of 8 bits; for w < d also d·w numbers. Where that is too much, fewer bits or a step for
    each column leave wider rows.
    Training holds n·(w + 3) float32 numbers more, beside the latents.

    Source: Li et al., "Adaptive low-precision training for embeddings in click-through rate
    prediction", AAAI 2023 (arXiv 2212.05735), algorithm 1 and equation 7. What differs: there the
    step's gradient comes of a second forward and backward pass with the moved rows, here of the
    only one: the gradient of the rows' values before they moved, times the derivative of the
    quantizer where they moved to. Steps are learned in their logarithm, so that their rate is
    relative, and codes have no zero: they are the 2^b odd multiples of Δ/2.

    Attributes:
        bits: b: 2, 4 or 8.
        scale: what shares a step: each ``"row"``, each ``"column"`` or the whole ``"table"``.
        scale_rate: learning rate of the steps in Adam, relative to their size.
        rounding_seed: of the stochastic rounding; the same seed gives the same bits.
    """

    name: ClassVar[str] = "alpt"
    bits: int = 8
    scale: Share = "row"
    scale_rate: float = 1e-3
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.scale)
        if self.bits not in _BITS:
            raise ValueError(f"bits must be one of {_BITS}, got {self.bits!r}")
        if not 0 <= self.scale_rate < 1:
            raise ValueError(f"scale_rate must be in [0, 1), got {self.scale_rate}")

    def plan_of_width(self, table: TableSpec, width: int) -> LookupPlan:
        rows = table.num_embeddings
        steps = shape_of_steps(self.scale, rows, width)
        stores = [
            Store("scale", *steps, table.dtype),
            Store("weight", rows, width, f"uint{self.bits}", Quantization("scale", trained=False)),
        ]
        head = None
        if width < table.embedding_dim:
            stores.append(Store("projection", table.embedding_dim, width, table.dtype))
            head = Linear("projection")
        probes = (Probe("weight", Digit(1, rows)),)
        return LookupPlan(rows, table.embedding_dim, tuple(stores), probes, head=head)

    def candidates(self, worths: Mapping[str, float] | None = None) -> Sequence[Method]:
        return (self, *(replace(self, bits=bits) for bits in _BITS[:0:-1] if bits != self.bits))

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Post-training quantization, of the leading singular vectors where rows are narrower.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        dtype = getattr(torch, table.dtype)
        stores = {}
        if plan.head is not None:
            width = plan.store("weight").width
            directions = principal_directions(weight, width, table.counts)
            weight = weight @ directions
            stores["projection"] = directions.to(dtype)
        importance = None if table.counts is None else table.counts.to(weight.device)
        scale, _ = calibrate(
            weight, self.bits, self.scale, symmetric=True, importance=importance, dtype=dtype
        )
        stores |= {"scale": scale, "weight": weight}
        return {**stores, "weight": pack_latents(plan, plan.store("weight"), stores)}

    def procedure(self) -> TableProcedure | None:
        return ScaleLearning(self)
