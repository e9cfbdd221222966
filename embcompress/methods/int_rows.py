"""Rows in 16, 8 or 4 bits a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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
from embcompress.methods.base import TableSpec
from embcompress.methods.narrow import NarrowRows
from embcompress.plan import Digit, Linear, LookupPlan, Probe, Quantization, Store
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.step_damping import StepDamping
from embcompress.procedures.stochastic_rounding import StochasticRounding


@dataclass(frozen=True)
class IntRows(NarrowRows):
    """Rows in a few bits a number: of full width, or narrower ones and a projection.

    Attributes:
        scale: what shares a step and a bias: each ``"column"``, each ``"row"`` (8 bytes a row
            more: at small widths as much as the row itself), or the whole ``"table"``.
        clip: whether :meth:`fit` gives up the outermost numbers for a smaller squared error;
            False keeps every error within half a step.
        rounding: what training leaves of an updated number: with ``"nearest"`` a float latent,
            which lookups read rounded to the nearest code; with ``"stochastic"``, where there is
            a :class:`~embcompress.TrainingProcedure`, one of the two nearest codes by chance
            (:class:`embcompress.procedures.stochastic_rounding.StochasticRounding`).
        rounding_seed: of these chances; the same seed gives the same bits.
    """

    bits: ClassVar[int]
    trains_steps: ClassVar[bool] = True
    scale: Share = "column"
    clip: bool = True
    rounding: Literal["nearest", "stochastic"] = "nearest"
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.scale)
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {self.rounding!r}")

    def plan_of_width(self, table: TableSpec, width: int) -> LookupPlan:
        rows = table.num_embeddings
        shape = shape_of_steps(self.scale, rows, width)
        quantization = Quantization("scale", "bias", trained=self.trains_steps)
        stores = [
            Store("scale", *shape, table.dtype),
            Store("bias", *shape, table.dtype),
            Store("weight", rows, width, f"uint{self.bits}", quantization),
        ]
        head = None
        if width < table.embedding_dim:
            stores.append(Store("projection", table.embedding_dim, width, table.dtype))
            head = Linear("projection")
        probes = (Probe("weight", Digit(1, rows)),)
        return LookupPlan(rows, table.embedding_dim, tuple(stores), probes, head=head)

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Post-training quantization; see :func:`embcompress.approximation.calibration.calibrate`.

        Narrower rows are the table's leading singular vectors'.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        dtype = getattr(torch, table.dtype)
        stores = {}
        if plan.head is not None:
            check_finite(weight)
            width = plan.store("weight").width
            directions = principal_directions(weight, width, table.counts)
            weight, stores["projection"] = weight @ directions, directions.to(dtype)
        importance = None if table.counts is None else table.counts.to(weight.device)
        scale, bias = calibrate(
            weight, self.bits, self.scale, clip=self.clip, importance=importance, dtype=dtype
        )
        stores |= {"scale": scale, "bias": bias, "weight": weight}
        return {**stores, "weight": pack_latents(plan, plan.store("weight"), stores)}

    def procedure(self) -> TableProcedure | None:
        """Learned steps that rows share are damped, and rows rounded where that is wanted."""
        is_damped = self.trains_steps and self.scale != "row"
        damping = StepDamping("weight") if is_damped else None
        if self.rounding == "nearest":
            return damping
        return StochasticRounding("weight", self.rounding_seed, damping)


@register
@dataclass(frozen=True)
class Int8(IntRows):
    """Rows in 8 bits a number, trained so or quantized after training.

    Every id keeps a row of its own. While it trains, a table holds float latents, which lookups
    read rounded to their codes; ``embcompress.deploy`` packs them. Under a budget too small for
    rows of full width, rows are narrower, and a projection follows.

    Memory: n·d bytes, and 8·d for a step and a bias a column, a quarter of the table; or for rows
    of width w < d, n·w + 8·w + 4·d·w bytes. Without a budget rows have the full width.

    Source: Jacob et al., "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference", CVPR 2018, section 2.1 (steps with a zero point); the step
    is learned as in Esser et al., "Learned step size quantization", ICLR 2020, equation 3. What
    differs: where there is a :class:`~embcompress.TrainingProcedure`, optimizers that divide
    gradients by their size move shared steps by less than other numbers
    (:class:`embcompress.procedures.step_damping.StepDamping`).
    """

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8


@register
@dataclass(frozen=True)
class Int4(IntRows):
    """Rows in 4 bits a number, trained so or quantized after training.

    As :class:`Int8`, with codes from 0 to 15.

    Memory: n·d / 2 bytes, and 8·d for a step and a bias a column, an eighth of the table; or for
    rows of width w < d, n·w / 2 + 8·w + 4·d·w bytes.

    Source: as :class:`Int8`; 4-bit embedding rows: Guan et al., "Post-training 4-bit quantization
    on embedding tables", 2019.
    """

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


@register
@dataclass(frozen=True)
class Int16(IntRows):
    """Rows in 16 bits a number, trained so or quantized after training.

    As :class:`Int8`, with codes from 0 to 65535, and steps that are not trained (they are too
    small for it, and fine enough): those of a new table reach 64 standard deviations of its
    vectors, those of :meth:`fit` are the trained table's. Steps have the table's dtype: in a
    float16 or bfloat16 table values are no finer.

    Memory: 2·n·d bytes, and 8·d for a step and a bias a column, half of the table; or for rows of
    width w < d, 2·n·w + 8·w + 4·d·w bytes.

    Source: as :class:`Int8`.
    """

    name: ClassVar[str] = "int16"
    bits: ClassVar[int] = 16
    trains_steps: ClassVar[bool] = False
