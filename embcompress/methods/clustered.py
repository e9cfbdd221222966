"""Weights that are clustered while they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from embcompress.families.product_method import CodeShape, ProductMethod
from embcompress.families.train_then_fit import GO_ON, form_of, train_then_fit
from embcompress.layouts.product import ProductLayout
from embcompress.methods import register
from embcompress.methods.base import TableSpec
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.phases import Phase, PhasedTable, Score, TableForm
from embcompress.procedures.query_learning import QueryLearning


@register
@dataclass(frozen=True)
class Clustered(ProductMethod):
    """Weights clustered while training, B[c₁(x)] ‖ … ‖ B[c_s(x)]: one small codebook B a table.

    A row is cut into s pieces, down to single numbers, and every piece of the table is one of the
    same few codewords. Training has two phases: the full table alone; then its k-means, in whose
    course every id keeps weights of its own, which get the gradients of the soft choice of a
    codeword and name the nearest one, while codewords follow the weights that chose them.
    Without phases a new table starts from hashed codes.

    Tables that share a budget get the same s and b.

    Memory: n·s·b bits, and (2^b − 1)·d/s numbers. Training holds the full table, and 2·n numbers
    more in the second phase.

    Source: Cho et al., "DKM: differentiable k-means clustering layer for neural network
    compression", ICLR 2022, section 3, and "eDKM: an efficient and accurate train-time weight
    clustering for large language models", 2023. What differs: lookups read the nearest codeword,
    not the soft mixture; codewords are trained by the loss as well as moved to the mean of the
    batch's weights, where there they are the k-means of all weights in every step. What eDKM saves
    in that step (unique weights, sharding) is not needed: only a batch's ids are compared with the
    codewords.

    Attributes:
        parts: s, a divisor of the width. None: follows from the budget.
        bits: b, 1 to 16. None: 1 to 8, follows from the budget.
        epochs: passes of the first phase.
        temperature: τ of the soft choice, in mean squared distances of a codeword to the next one.
        pull: share of the way to the mean of its weights in a batch that a codeword goes, in
            [0, 1).
        query_rate: learning rate of the weights in the second phase, by that of the codebook.
    """

    name: ClassVar[str] = "clustered"
    commitment: ClassVar[float] = 0.0
    epochs: int = 1
    temperature: float = 1.0
    pull: float = 0.1
    query_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        for name in ("temperature", "query_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.pull < 1:
            raise ValueError(f"pull must be in [0, 1), got {self.pull}")

    def layout(self, table: TableSpec, parts: int, code: CodeShape) -> ProductLayout:
        (bits,), shape = code, (table.num_embeddings, table.embedding_dim)
        return ProductLayout(*shape, parts, bits, one_book=parts > 1)

    def bits_tried(self) -> range:
        return range(1, 9)

    def procedure(self) -> TableProcedure | None:
        return QueryLearning(self)

    def phases(self) -> tuple[Phase, ...]:
        return train_then_fit(self.epochs)

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        return self.procedure() if phase.name == GO_ON else None

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        return form_of(self, phase, tables)
