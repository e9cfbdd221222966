"""Differentiable product quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from embcompress.families.product_method import ProductMethod
from embcompress.methods import register
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.query_learning import QueryLearning


@register
@dataclass(frozen=True)
class DifferentiableProductQuantization(ProductMethod):
    """Differentiable product quantization, C₁[c₁(x)] ‖ … ‖ C_s[c_s(x)] with codes of queries.

    Every id has a query in training, a vector of its own, and each of its s codes names the
    codeword nearest to a part of that. The gradient of the codeword goes to the query, too,
    straight through the choice. After training the queries are gone.

    Tables that share a budget get codes of the same shape.

    Memory: n·s·b bits, and (2^b − 1)·d numbers. While it trains, with a
    :class:`~embcompress.TrainingProcedure`, the full table of queries and 2·n numbers more; without
    one, codes stay as they are, hashed.

    Source: Chen, Li, Sun: "Differentiable product quantization for end-to-end embedding
    compression", ICML 2020, section 2.3 (the vector-quantized form, where keys and values are one).
    What differs: queries start at hashed codewords; they are trained by row-wise Adagrad; codes
    are computed after a step for the ids of its batch, not in the lookup; the two terms that hold
    queries and codewords together are steps of a fixed share of their distance instead of losses.

    Attributes:
        parts: s, a divisor of the width. None: follows from the budget.
        bits: b, 1 to 16. None: 4 to 12, follows from the budget.
        query_rate: learning rate of the queries, by that of the codebooks.
        commitment: share of the way to its codewords that a query goes in a step, in [0, 1).
        pull: share of the way to the mean of its queries in a batch that a codeword goes, in
            [0, 1).
    """

    name: ClassVar[str] = "dpq"
    temperature: ClassVar[float | None] = None
    query_rate: float = 1.0
    commitment: float = 0.0
    pull: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.query_rate > 0:
            raise ValueError(f"query_rate must be positive, got {self.query_rate}")
        for name in ("commitment", "pull"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def procedure(self) -> TableProcedure | None:
        return QueryLearning(self)
