"""Near-equal blocks stored once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.approximation.deduplication import deduplicate
from embcompress.engine.hashing import hash_bucket
from embcompress.layouts.packing import pack_codes
from embcompress.layouts.pruned import MOST_ROWS
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.methods.full import Full
from embcompress.plan import Code, Digit, LookupPlan, Probe, Store
from embcompress.procedures.phases import Phase, PhasedTable, Score, TableForm

BLOCKS, CODES = "blocks", "codes"
_TRAIN, _FINE_TUNE = "train", "fine_tune"
_CHUNK = 1 << 16  # codes; a multiple of 8, so chunks begin at a byte


@register
@dataclass(frozen=True)
class Dedup(Method):
    """Near-equal blocks of a trained table stored once, B[c₁(x)] ‖ … ‖ B[c_s(x)].

    Training has two phases. In the first the full table is trained. Then it is cut into blocks, a
    block being one of the s equal pieces of a row; near-equal blocks, of whatever ids and pieces,
    are replaced by one, and a packed code for each says which. In the second phase these are
    trained further. The budget decides how many blocks are kept, and so how far from its own
    numbers a block may come to lie. Without phases a new table has hashed codes and learns its
    blocks.

    Memory: u·d/s numbers for u kept blocks, and ⌈log2(u + 1)⌉ bits for each of n·s codes. Training
    holds the full table in the first phase, and its optimizer state.

    Source: Zhou et al., "Serving deep learning models with deduplication from relational
    databases", VLDB 2022, as tried on embedding tables by Zhang et al.,
    "Experimental analysis of large-scale learnable vector storage compression", VLDB 2024. There a
    block is a tile of several rows. Ids that are next to each other have nothing in common here, so
    blocks of several rows are rarely near-equal, and a block lies within a row. There blocks of
    one bucket of a locality-sensitive hash are duplicates; here they are clustered by k-means
    (:mod:`embcompress.approximation.deduplication`), and duplicates take their mean.

    Attributes:
        pieces: s, a divisor of the width.
        epochs: passes of the first phase.
    """

    name: ClassVar[str] = "dedup"
    pieces: int = 1
    epochs: int = 1

    def __post_init__(self) -> None:
        if self.pieces < 1:
            raise ValueError(f"pieces must be at least 1, got {self.pieces}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")

    # -- the plan

    def sizes(self, table: TableSpec) -> range:
        """Numbers of blocks that are kept."""
        return range(1, min(table.num_embeddings * self.pieces, MOST_ROWS - 1) + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        n, d, s = table.num_embeddings, table.embedding_dim, self.pieces
        if d % s:
            raise ValueError(f"pieces = {s} does not divide the table's width, {d}")
        return LookupPlan(
            n,
            d,
            stores=(
                Store(BLOCKS, size, d // s, table.dtype),
                Store(CODES, n, s, f"uint{size.bit_length()}"),
            ),
            probes=tuple(Probe(BLOCKS, Code(CODES, size, Digit(1, n), t)) for t in range(s)),
            combine="concat",
        )

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        """Hashed codes."""
        codes, kept, key = plan.store(CODES), plan.store(BLOCKS).rows, table.key(0)
        for start in range(0, codes.rows * codes.width, _CHUNK):
            places = torch.arange(start, min(start + _CHUNK, codes.rows * codes.width))
            packed = pack_codes(hash_bucket(places, key, kept), codes.bits)
            first = start * codes.bits // 8
            stores[CODES][first : first + len(packed)].copy_(packed)

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """The blocks of the table; see :func:`embcompress.approximation.deduplication.deduplicate`.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        blocks, codes = plan.store(BLOCKS), plan.store(CODES)
        pieces = weight.detach().float().cpu().reshape(-1, blocks.width)
        counts = None if table.counts is None else table.counts.cpu().repeat_interleave(codes.width)
        kept, which = deduplicate(pieces, blocks.rows, counts, table.seed)
        return {
            BLOCKS: kept.to(getattr(torch, blocks.dtype)),
            CODES: pack_codes(which, codes.bits),
        }

    # -- training

    def phases(self) -> tuple[Phase, ...]:
        return Phase(_TRAIN, self.epochs), Phase(_FINE_TUNE)

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        return [self._form(phase, table) for table in tables]

    def _form(self, phase: Phase, table: PhasedTable) -> TableForm:
        if phase.name == _TRAIN:
            full = Full().plan(table.spec, table.spec.num_embeddings)
            return TableForm(full, table.new_stores(full))
        (weight,) = table.stores().values()
        stores = self.fit(table.spec, table.built, weight)
        return TableForm(table.built, {k: v.to(weight.device) for k, v in stores.items()})
