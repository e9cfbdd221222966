"""Shared sub-vectors, assigned by similarity in a trained table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from embcompress.families.product_method import ProductMethod
from embcompress.families.train_then_fit import form_of, train_then_fit
from embcompress.methods import register
from embcompress.procedures.phases import Phase, PhasedTable, Score, TableForm


@register
@dataclass(frozen=True)
class Subspace(ProductMethod):
    """Subspace embedding, S₁[c₁(x)] ‖ … ‖ S_s[c_s(x)]: sub-vectors shared by similar ids.

    Training has two phases. In the first the full table is trained. Then k-means of each of its s
    subspaces says which ids share a sub-vector, and in the second phase the sub-vectors are trained
    further, with everything else, while the assignment stays. Without phases a new table has
    hashed codes.

    Tables that share a budget get the same s and b.

    Memory: n·s·b bits, and (2^b − 1)·d numbers. Training holds the full table in the first phase,
    and its optimizer state.

    Source: Jaiswal et al., "Lightweight adaptation of neural language models via subspace
    embedding", CIKM 2023, section 3 (the assignment by clusters). What differs: there two tokens
    never have all sub-vectors in common, here ids that are similar in every subspace may; there
    the trained table is that of a pretrained model, for which see
    :meth:`embcompress.Embedding.from_pretrained`.

    Attributes:
        parts: s, a divisor of the width. None: follows from the budget.
        bits: b, 1 to 16. None: 4 to 12, follows from the budget.
        epochs: passes of the first phase.
    """

    name: ClassVar[str] = "subspace"
    epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")

    def phases(self) -> tuple[Phase, ...]:
        return train_then_fit(self.epochs)

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        return form_of(self, phase, tables)
