"""Narrow rows in a few bits, and a projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import (
    PACKED_VALUE_BITS,
    Digit,
    Linear,
    LookupPlan,
    Probe,
    Quantization,
    Store,
)


@register
@dataclass(frozen=True)
class LowBit(Method):
    """Narrow rows in 8, 4, 2 or 1 bits a number and a projection, P·Q(E[x]).

    Memory: n·w·b / 8 bytes
    """

    name: ClassVar[str] = "low_bit"
    width: int | None = None
    bits: int | None = None
    bias: bool = False

    def shapes(self, table: TableSpec) -> list[tuple[int, int]]:
        widths = range(1, table.embedding_dim + 1) if self.width is None else (self.width,)
        bits = PACKED_VALUE_BITS if self.bits is None else (self.bits,)
        return sorted(((w, b) for w in widths for b in bits), key=lambda s: (s[0] * s[1], s[0]))

    def sizes(self, table: TableSpec) -> range:
        return range(len(self.shapes(table)))

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        rows, dim = table.num_embeddings, table.embedding_dim
        width, bits = self.shapes(table)[size]
        quantization = Quantization("scale", "bias" if self.bias else None)
        extra = (Store("bias", 1, width, table.dtype),) if self.bias else ()
        return LookupPlan(
            rows,
            dim,
            stores=(
                Store("scale", 1, width, table.dtype),
                *extra,
                Store("weight", rows, width, f"uint{bits}", quantization),
                Store("projection", dim, width, table.dtype),
            ),
            probes=(Probe("weight", Digit(1, rows)),),
            head=Linear("projection"),
        )
