"""Rows of full width in 8 or 4 bits a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.calibration import Share, calibrate, check_share, shape_of_steps
from embcompress.latents import pack_latents
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Digit, LookupPlan, Probe, Quantization, Store


@dataclass(frozen=True)
class IntRows(Method):
    """Rows of full width in a few bits a number.

    Attributes:
        scale: what shares a step and a bias: each ``"column"``, each ``"row"`` (8 bytes a row
            more: at small widths as much as the row itself), or the whole ``"table"``.
        clip: whether :meth:`fit` gives up the outermost numbers for a smaller squared error;
            False keeps every error within half a step.
    """

    bits: ClassVar[int]
    scale: Share = "column"
    clip: bool = True

    def __post_init__(self) -> None:
        check_share(self.scale)

    def sizes(self, table: TableSpec) -> range:
        return range(table.num_embeddings, table.num_embeddings + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        rows, width = table.num_embeddings, table.embedding_dim
        shape = shape_of_steps(self.scale, rows, width)
        quantization = Quantization("scale", "bias")
        return LookupPlan(
            rows,
            width,
            stores=(
                Store("scale", *shape, table.dtype),
                Store("bias", *shape, table.dtype),
                Store("weight", rows, width, f"uint{self.bits}", quantization),
            ),
            probes=(Probe("weight", Digit(1, rows)),),
        )

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Post-training quantization; see :func:`embcompress.calibration.calibrate`.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        dtype = getattr(torch, table.dtype)
        importance = None if table.counts is None else table.counts.to(weight.device)
        scale, bias = calibrate(
            weight, self.bits, self.scale, clip=self.clip, importance=importance, dtype=dtype
        )
        stores = {"scale": scale, "bias": bias, "weight": weight}
        return {**stores, "weight": pack_latents(plan, plan.store("weight"), stores)}


@register
@dataclass(frozen=True)
class Int8(IntRows):
    """Rows of full width in 8 bits a number, trained so or quantized after training.

    Every id keeps a row of its own. While it trains, a table holds float latents, which lookups
    read rounded to their codes; ``embcompress.deploy`` packs them.

    Memory: n·d bytes, and 8·d for a step and a bias a column; a quarter of the table. There is
    one size: budgets below it raise BudgetError, above it all rows are held so.

    Source: Jacob et al., "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference", CVPR 2018, section 2.1 (steps with a zero point); the step
    is learned as in Esser et al., "Learned step size quantization", ICLR 2020.
    """

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8


@register
@dataclass(frozen=True)
class Int4(IntRows):
    """Rows of full width in 4 bits a number, trained so or quantized after training.

    As :class:`Int8`, with codes from 0 to 15.

    Memory: n·d / 2 bytes, and 8·d for a step and a bias a column; an eighth of the table.

    Source: as :class:`Int8`; 4-bit embedding rows: Guan et al., "Post-training 4-bit quantization
    on embedding tables", 2019.
    """

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
