"""Narrow rows in a few bits, and a projection."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import calibrate, check_finite
from embcompress.engine.quantization import code_positions, dequantize
from embcompress.layouts.latents import pack_latents
from embcompress.methods import register
from embcompress.methods.base import JointMethod, TableSpec
from embcompress.methods.full import Full
from embcompress.plan import (
    FLOAT_BITS,
    Digit,
    Linear,
    LookupPlan,
    Probe,
    Quantization,
    Store,
)

#: Bits of a number that the dial has; 16 of them never pay beside wider rows.
_BITS = (1, 2, 4, 8)
_REFITS = 8
_CHUNK_ROWS = 1 << 16


@register
@dataclass(frozen=True)
class LowBit(JointMethod):
    """Narrow rows in 8, 4, 2 or 1 bits a number and a projection, P·Q(E[x]).

    Every id keeps a row of its own, of w ≤ d numbers in b bits, with one step a column. Few bits
    for every id beat many bits that ids share. While it trains, a table holds float latents,
    which lookups read rounded to their codes; ``embcompress.deploy`` packs them. Bags are pooled
    before the projection, so it runs once a bag.

    Tables under one budget get the same w and b, as far as bytes allow.

    Memory: n·w·b / 8 bytes, 4·w for the steps and 4·d·w for the projection. The dial goes through
    (w, b) = (1, 1), (1, 2), (1, 4), (2, 4), …, (d, 4), and on in 8 bits to (d, 8). At equal bits a
    row, wider rows have a larger projection. The dial was chosen by validation AUC on
    MovieLens-100K with one seed, which is weak evidence; where the projection is small beside the
    rows, wide rows in 2 bits may be better: ``bits=2`` has them.

    Source: low rank as in Lan et al., "ALBERT", ICLR 2020, section 3.1, with steps learned as in
    Esser et al., "Learned step size quantization", ICLR 2020.

    Attributes:
        width: fixes w (None: the dial chooses), 1 to d.
        bits: fixes b (None: the dial chooses), 1, 2, 4 or 8.
        head_dtype: dtype of the projection (None: the table's). ``"float16"`` halves it, for
            budgets where it counts.
    """

    name: ClassVar[str] = "low_bit"
    width: int | None = None
    bits: int | None = None
    head_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.width is not None and (not isinstance(self.width, int) or self.width < 1):
            raise ValueError(f"width must be an integer of at least 1, got {self.width!r}")
        if self.bits is not None and self.bits not in _BITS:
            raise ValueError(f"bits must be one of {_BITS}, got {self.bits!r}")
        if self.head_dtype is not None and self.head_dtype not in FLOAT_BITS:
            raise ValueError(
                f"head_dtype must be one of {', '.join(FLOAT_BITS)}, got {self.head_dtype!r}"
            )

    def shapes(self, table: TableSpec) -> tuple[tuple[int, int], ...]:
        """The pairs (w, b) of the dial, in order of bytes.

        Raises:
            ValueError: the width of the settings is more than the table's.
        """
        if self.width is not None and self.width > table.embedding_dim:
            raise ValueError(
                f"width must be at most the table's, {table.embedding_dim}, got {self.width}"
            )
        return _shapes(self, table.num_embeddings, table.embedding_dim, table.dtype)

    def _pairs(self, widest: int) -> list[tuple[int, int]]:
        """Pairs that the settings allow; without settings, those worth their bytes."""
        if self.width is not None:
            return [(self.width, b) for b in _BITS if self.bits in (None, b)]
        if self.bits is not None:
            return [(width, self.bits) for width in range(1, widest + 1)]
        narrow = [(1, 1), (1, 2)]
        four = [(width, 4) for width in range(1, widest + 1)]
        return [*narrow, *four, *((width, 8) for width in range(widest // 2 + 1, widest + 1))]

    def sizes(self, table: TableSpec) -> range:
        return range(len(self.shapes(table)))

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        return self._plan(table, *self.shapes(table)[size])

    def group_sizes(self, tables: Sequence[TableSpec]) -> range:
        longest = max(len(self.shapes(table)) for table in tables)
        return range((longest - 1) * len(tables) + 1)

    def group_plans(self, tables: Sequence[TableSpec], size: int) -> list[LookupPlan]:
        """The same numbers and bits for the ids of all tables.

        Between two pairs of the dial, the smallest tables have the larger one. A table that takes
        no fewer bytes so stays uncompressed.
        """
        position, ahead = divmod(size, len(tables))
        by_size = sorted(range(len(tables)), key=lambda number: tables[number].dense_bytes)
        plans: list[LookupPlan] = [Full().plan(table, table.num_embeddings) for table in tables]
        for rank, number in enumerate(by_size):
            pairs = self.shapes(tables[number])
            pair = pairs[min(position + (rank < ahead), len(pairs) - 1)]
            plan = self._plan(tables[number], *pair)
            plans[number] = min(plans[number], plan, key=lambda each: each.bytes)
        return plans

    def _plan(self, table: TableSpec, width: int, bits: int) -> LookupPlan:
        rows, columns = table.num_embeddings, table.embedding_dim
        return LookupPlan(
            rows,
            columns,
            stores=(
                Store("scale", 1, width, table.dtype),
                Store("weight", rows, width, f"uint{bits}", Quantization("scale")),
                Store("projection", columns, width, self.head_dtype or table.dtype),
            ),
            probes=(Probe("weight", Digit(1, rows)),),
            head=Linear("projection"),
        )

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """The best rank-w approximation, its rows quantized and the projection refitted in turns.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        store = plan.store("weight")
        importance = torch.ones(len(weight), device=weight.device)
        if table.counts is not None:  # an id that was never seen counts a little
            importance = table.counts.to(importance) + 0.1
        factors = _Factors(weight, importance)
        rows = factors.leading(store.width)
        best: tuple[float, Tensor, Tensor, Tensor] | None = None
        for _ in range(_REFITS):
            scale, _ = calibrate(rows, store.bits, "column", importance=importance, symmetric=True)
            projection = factors.projection(_quantized(rows, scale, store.bits))
            error = factors.error(_quantized(rows, scale, store.bits), projection)
            if best is None or error < best[0]:
                best = error, rows, scale, projection
            rows = factors.rows(projection)
        assert best is not None
        _, rows, scale, projection = best
        stores = {
            "scale": scale.to(getattr(torch, plan.store("scale").dtype)),
            "weight": rows,
            "projection": projection.to(getattr(torch, plan.store("projection").dtype)),
        }
        return {**stores, "weight": pack_latents(plan, store, stores)}


@functools.lru_cache(maxsize=64)
def _shapes(method: LowBit, rows: int, columns: int, dtype: str) -> tuple[tuple[int, int], ...]:
    """See the method of that name; budgets ask for it again and again."""
    table = TableSpec(rows, columns, dtype=dtype)
    pairs = method._pairs(columns)
    return tuple(sorted(pairs, key=lambda pair: method._plan(table, *pair).bytes))


def _quantized(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    return dequantize(code_positions(rows, scale, None, bits).round(), scale, None, bits)


class _Factors:
    """Weighted least squares of a table by rows times a projection.

    Small matrices are float64; nothing of the table's size is copied but rows of the width.
    """

    def __init__(self, weight: Tensor, importance: Tensor) -> None:
        self._weight, self._importance = weight, importance

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """leftᵀ · diag(importance) · right, in chunks."""
        total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
        parts = (tensor.split(_CHUNK_ROWS) for tensor in (left, self._importance, right))
        for one, importance, other in zip(*parts, strict=True):
            total += (one.double() * importance.double()[:, None]).T @ other.double()
        return total

    def leading(self, width: int) -> Tensor:
        """(rows, width) coordinates along the leading singular vectors."""
        gram = self._product(self._weight, self._weight)
        vectors = torch.linalg.eigh(gram).eigenvectors[:, -width:]
        return self._weight.float() @ vectors.float()

    def projection(self, rows: Tensor) -> Tensor:
        """(d, width) projection that fits the table best from the rows."""
        gram = self._product(rows, rows)
        return (torch.linalg.pinv(gram, hermitian=True) @ self._product(rows, self._weight)).T

    def rows(self, projection: Tensor) -> Tensor:
        """(rows, width) rows that fit the table best through the projection."""
        inverse = torch.linalg.pinv(projection)
        return self._weight.float() @ inverse.T.float()

    def error(self, rows: Tensor, projection: Tensor) -> float:
        """Weighted squared error, up to the table's own square."""
        fitted = projection @ self._product(rows, rows) * projection
        crossed = projection.T * self._product(rows, self._weight)
        return float(fitted.sum() - 2 * crossed.sum())
