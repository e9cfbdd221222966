"""What methods of product codes share: the dial, hashed codes, and the fit to a trained table."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.clustering import cluster
from embcompress.engine.hashing import hash_bucket
from embcompress.layouts.packing import absent_code, pack_codes
from embcompress.layouts.product import (
    CODES,
    HOT_CODES,
    NORM_CODES,
    NORMS,
    ProductLayout,
    codebook,
    unit_norm,
)
from embcompress.methods.base import JointMethod, TableSpec
from embcompress.methods.full import Full
from embcompress.plan import LookupPlan

#: Bits of a code, and what else a method's dial chooses of codes beside how many an id has.
CodeShape: TypeAlias = tuple[int, ...]
#: Bits of a code that are tried where the settings leave them open.
_BITS = range(4, 13)
_CHUNK = 1 << 18  # ids


@dataclass(frozen=True)
class ProductMethod(JointMethod):
    """A method whose plans are product layouts of one shape for all tables of a budget.

    Attributes:
        parts: a divisor of the width. None: follows from the budget.
        bits: of a code, 1 to 16. None: follows from the budget.
    """

    parts: int | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.parts is not None and self.parts < 1:
            raise ValueError(f"parts must be at least 1, got {self.parts}")
        if self.bits is not None and not 1 <= self.bits <= 16:
            raise ValueError(f"bits must be in [1, 16], got {self.bits}")

    def layout(self, table: TableSpec, parts: int, code: CodeShape) -> ProductLayout:
        """The layout of a table in so many such codes an id."""
        (bits,) = code
        return ProductLayout(table.num_embeddings, table.embedding_dim, parts, bits)

    def bits_tried(self) -> range:
        """Bits of a code that the dial goes through where the settings leave them open."""
        return _BITS

    def codes_tried(self) -> Sequence[CodeShape]:
        """Codes that the dial goes through."""
        return [(bits,) for bits in ([self.bits] if self.bits else self.bits_tried())]

    def mean_bits(self, code: CodeShape) -> float:
        """Bits of a code, on average of the ids."""
        return code[0]

    def dropped(self, table: TableSpec, weight: Tensor) -> Tensor:
        """The ids that :meth:`fit` makes absent."""
        return torch.empty(0, dtype=torch.int64)

    def _shapes(self, tables: Sequence[TableSpec]) -> tuple[tuple[int, CodeShape], ...]:
        """Parts and their codes, in rising order of bytes and of bits a vector."""
        return _shapes(self, tuple((t.num_embeddings, t.embedding_dim, t.dtype) for t in tables))

    def group_sizes(self, tables: Sequence[TableSpec]) -> range:
        return range(len(self._shapes(tables)))

    def group_plans(self, tables: Sequence[TableSpec], size: int) -> list[LookupPlan]:
        return self.shaped_plans(tables, *self._shapes(tables)[size])

    def shaped_plans(
        self, tables: Sequence[TableSpec], parts: int, code: CodeShape
    ) -> list[LookupPlan]:
        """Every table in the same codes; one that they would not make smaller stays full."""
        plans = [self.layout(table, parts, code).plan(table.dtype) for table in tables]
        if len(tables) == 1:
            return plans
        return [
            min(_full(table), plan, key=_bytes) for table, plan in zip(tables, plans, strict=True)
        ]

    def shaped_bytes(self, tables: Sequence[TableSpec], parts: int, code: CodeShape) -> int:
        """Bytes of :meth:`shaped_plans`, which are many to make when all shapes are compared."""
        sizes = [self.layout(table, parts, code).bytes(table.dtype) for table in tables]
        if len(tables) == 1:
            return sizes[0]
        full = (_full_bytes(t.num_embeddings, t.embedding_dim, t.dtype) for t in tables)
        return sum(map(min, sizes, full))

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        """Hashed codes."""
        key, names = 0, (CODES, HOT_CODES, NORM_CODES)
        for codes in (store for store in plan.stores if store.name in names):
            words, width = absent_code(codes.bits), codes.width
            for start in range(0, codes.rows, _CHUNK):  # a multiple of 8 codes begins at a byte
                ids = torch.arange(start, min(start + _CHUNK, codes.rows))
                columns = [hash_bucket(ids, table.key(key + t), words) for t in range(width)]
                packed = pack_codes(torch.stack(columns, 1).reshape(-1), codes.bits)
                first = start * width * codes.bits // 8
                stores[codes.name][first : first + len(packed)].copy_(packed)
            key += width

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """K-means of every part; see :func:`embcompress.clustering.cluster`.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        layout = ProductLayout.of(plan)
        vectors = weight.detach().float().cpu()
        stores: dict[str, Tensor] = {}
        if layout.norm_bits is not None:
            vectors, norms = unit_norm(vectors)
            words, seed = absent_code(layout.norm_bits), table.seed + layout.parts
            stores[NORMS], codes = cluster(norms, words, table.counts, seed)
            stores[NORM_CODES] = pack_codes(codes, layout.norm_bits)
        columns = self._fit_parts(table, layout, vectors, stores)
        columns[self.dropped(table, weight)] = layout.words
        stores[CODES] = pack_codes(columns.reshape(-1), layout.bits)
        return stores

    def _fit_parts(
        self, table: TableSpec, layout: ProductLayout, vectors: Tensor, stores: dict[str, Tensor]
    ) -> Tensor:
        """(n, parts) codes; their codebooks are added to the stores."""
        if layout.one_book:
            pieces = vectors.reshape(len(vectors) * layout.parts, -1)
            counts = table.counts
            counts = None if counts is None else counts.repeat_interleave(layout.parts)
            stores[codebook(0)], codes = cluster(pieces, layout.words, counts, table.seed)
            return codes.view(-1, layout.parts)
        columns = []
        for t, part in enumerate(vectors.chunk(layout.parts, dim=1)):
            stores[codebook(t)], codes = cluster(part, layout.words, table.counts, table.seed + t)
            columns.append(codes)
        return torch.stack(columns, 1)


def _full(table: TableSpec) -> LookupPlan:
    return Full().plan(table, table.num_embeddings)


@functools.lru_cache(maxsize=4096)
def _full_bytes(rows: int, width: int, dtype: str) -> int:
    return _full(TableSpec(rows, width, dtype=dtype)).bytes


def _bytes(plan: LookupPlan) -> int:
    return plan.bytes


@functools.lru_cache(maxsize=64)
def _shapes(
    method: ProductMethod, sizes: tuple[tuple[int, int, str], ...]
) -> tuple[tuple[int, CodeShape], ...]:
    """See the method of that name; budgets ask for it again and again."""
    tables = [TableSpec(rows, width, dtype=dtype) for rows, width, dtype in sizes]
    width = math.gcd(*(table.embedding_dim for table in tables))
    if method.parts is not None and width % method.parts:
        raise ValueError(f"parts = {method.parts} does not divide the tables' width, {width}")
    divisors = [parts for parts in range(1, width + 1) if width % parts == 0]
    sized = sorted(
        (
            method.shaped_bytes(tables, parts, code),
            -parts * method.mean_bits(code),
            parts,
            code,
        )
        for parts in ([method.parts] if method.parts else divisors)
        for code in method.codes_tried()
    )
    shapes: list[tuple[int, CodeShape]] = []
    most = 0.0
    for _, less_bits, parts, code in sized:
        if -less_bits > most:
            shapes.append((parts, code))
            most = -less_bits
    return tuple(shapes)
