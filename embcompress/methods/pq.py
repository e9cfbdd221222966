"""Product quantization: packed codes and small codebooks."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from embcompress.calibration import check_finite
from embcompress.clustering import cluster
from embcompress.code_learning import CodeLearning
from embcompress.engine.reference import hash_bucket
from embcompress.methods import register
from embcompress.methods.base import JointMethod, TableSpec
from embcompress.methods.full import Full
from embcompress.packing import absent_code, pack_codes
from embcompress.plan import LookupPlan, total_bytes
from embcompress.procedure import TableProcedure
from embcompress.product_layout import (
    CODES,
    NORM_CODES,
    NORMS,
    ProductLayout,
    codebook,
    unit_norm,
)

#: Bits of a code that are tried where the settings leave them open.
_BITS = range(4, 13)
_CHUNK = 1 << 18  # ids


@register
@dataclass(frozen=True)
class ProductQuantization(JointMethod):
    """Product quantization, C₁[c₁(x)] ‖ … ‖ C_s[c_s(x)]: packed codes into s small codebooks.

    A vector is cut into s parts, each the codeword that a code of b bits names. From a trained
    table, codes and codebooks are the k-means of each part; the codebooks can be trained further.
    A new table has hashed codes, and learns its codebooks: two ids have the same vector only if
    all s codes agree. Codes stay, or are learned too.

    Tables that share a budget get codes of the same shape.

    Memory: n·s·b bits, and (2^b − 1)·d numbers (the last code stands for "absent", a zero
    vector); with norms apart also n·b' bits and 2^b' − 1 numbers.

    Source: Jégou, Douze, Schmid: "Product quantization for nearest neighbor search", PAMI 2011,
    section II; Joulin et al.: "FastText.zip", 2016, section 3.2 (norms apart, codebooks trained
    further, and rows of the smallest norm dropped). Learned codes: van den Oord et al., "Neural
    discrete representation learning", 2017, section 3.2 (straight-through); ours move every few
    steps instead of in every lookup.

    Attributes:
        parts: s, a divisor of the width. None: follows from the budget.
        bits: b, 1 to 16. None: 4 to 12, follows from the budget.
        norm_bits: b', 1 to 16: parts hold vectors of unit norm, and another code an id names its
            norm. None: no norms apart.
        drop: share of the ids, those of the smallest count·norm², that :meth:`fit` makes absent.
        codes: "learned" while the table trains, where there is a
            :class:`~embcompress.TrainingProcedure`, which then holds n·(d + 1) numbers more; or
            "fixed".
        interval: learned codes move every so many steps.
        code_rate: learning rate of the ids' own steps that codes follow, in row-wise Adagrad, by
            that of the codebooks.
    """

    name: ClassVar[str] = "pq"
    parts: int | None = None
    bits: int | None = None
    norm_bits: int | None = None
    drop: float = 0.0
    codes: Literal["fixed", "learned"] = "learned"
    interval: int = 10
    code_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.parts is not None and self.parts < 1:
            raise ValueError(f"parts must be at least 1, got {self.parts}")
        for name in ("bits", "norm_bits"):
            bits = getattr(self, name)
            if bits is not None and not 1 <= bits <= 16:
                raise ValueError(f"{name} must be in [1, 16], got {bits}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {self.drop}")
        if self.codes not in ("fixed", "learned"):
            raise ValueError(f"codes must be 'fixed' or 'learned', got {self.codes!r}")
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")
        if not self.code_rate > 0:
            raise ValueError(f"code_rate must be positive, got {self.code_rate}")

    def _shapes(self, tables: Sequence[TableSpec]) -> tuple[tuple[int, int], ...]:
        """(parts, bits) in rising order of bytes, each with more bits a vector than the last."""
        return _shapes(self, tuple((t.num_embeddings, t.embedding_dim, t.dtype) for t in tables))

    def group_sizes(self, tables: Sequence[TableSpec]) -> range:
        return range(len(self._shapes(tables)))

    def group_plans(self, tables: Sequence[TableSpec], size: int) -> list[LookupPlan]:
        return self.shaped_plans(tables, *self._shapes(tables)[size])

    def shaped_plans(self, tables: Sequence[TableSpec], parts: int, bits: int) -> list[LookupPlan]:
        """Every table in the same codes; one that they would not make smaller stays full."""
        plans = [self._plan(table, parts, bits) for table in tables]
        if len(tables) == 1:
            return plans
        return [
            Full().plan(table, table.num_embeddings) if plan.bytes >= table.dense_bytes else plan
            for table, plan in zip(tables, plans, strict=True)
        ]

    def _plan(self, table: TableSpec, parts: int, bits: int) -> LookupPlan:
        layout = ProductLayout(
            table.num_embeddings, table.embedding_dim, parts, bits, self.norm_bits
        )
        return layout.plan(table.dtype)

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        """Hashed codes."""
        key = 0
        for codes in (store for store in plan.stores if store.name in (CODES, NORM_CODES)):
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
        columns = []
        for t, part in enumerate(vectors.chunk(layout.parts, dim=1)):
            stores[codebook(t)], codes = cluster(part, layout.words, table.counts, table.seed + t)
            columns.append(codes)
        every = torch.stack(columns, 1)
        if self.drop > 0:
            every[self._least(table, weight)] = layout.words
        stores[CODES] = pack_codes(every.reshape(-1), layout.bits)
        return stores

    def procedure(self) -> TableProcedure | None:
        return CodeLearning(self) if self.codes == "learned" else None

    def _least(self, table: TableSpec, weight: Tensor) -> Tensor:
        """The ids whose vectors are missed least."""
        importance = weight.detach().float().square().sum(1).cpu()
        if table.counts is not None:
            importance = importance * table.counts.float().cpu()
        return importance.argsort(stable=True)[: int(self.drop * table.num_embeddings)]


@functools.lru_cache(maxsize=64)
def _shapes(
    method: ProductQuantization, sizes: tuple[tuple[int, int, str], ...]
) -> tuple[tuple[int, int], ...]:
    """See the method of that name; budgets ask for it again and again."""
    tables = [TableSpec(rows, width, dtype=dtype) for rows, width, dtype in sizes]
    width = math.gcd(*(table.embedding_dim for table in tables))
    if method.parts is not None and width % method.parts:
        raise ValueError(f"parts = {method.parts} does not divide the tables' width, {width}")
    divisors = [parts for parts in range(1, width + 1) if width % parts == 0]
    sized = sorted(
        (total_bytes(method.shaped_plans(tables, parts, bits)), -parts * bits, parts, bits)
        for parts in ([method.parts] if method.parts else divisors)
        for bits in ([method.bits] if method.bits else _BITS)
    )
    shapes: list[tuple[int, int]] = []
    for _, _, parts, bits in sized:
        if not shapes or parts * bits > shapes[-1][0] * shapes[-1][1]:
            shapes.append((parts, bits))
    return tuple(shapes)
