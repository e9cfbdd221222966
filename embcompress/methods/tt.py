"""Tensor-train decompositions of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.layouts.factors import balanced_factors
from embcompress.layouts.tensor_train import TrainLayout, balanced_digits
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import LookupPlan, TensorTrain


@register
@dataclass(frozen=True)
class TensorTrainTable(Method):
    """Tensor train, G₁[x₁]·G₂[x₂] ⋯ Gₘ[xₘ]: a chain of matrix products by the digits of the id.

    The table is read as a tensor whose axes are m digits of the id (in radices n₁ … nₘ of about
    equal size, with n₁ ⋯ nₘ ≥ n) and m digits of the column (d₁ ⋯ dₘ = d). Number j of the vector
    of x is G₁[x₁, j₁] · G₂[x₂, j₂] ⋯ Gₘ[xₘ, jₘ], where Gₖ[xₖ, jₖ] is a matrix of rₖ₋₁ × rₖ numbers
    and r₀ = rₘ = 1. No two ids share all their matrices. Matrices are gathered by the compiled
    engine and multiplied by torch, before pooling.

    Memory: Σ rₖ₋₁·nₖ·dₖ·rₖ numbers; the dial raises one rank after another.

    Source: Yin et al., "TT-Rec: Tensor train compression for deep learning recommendation models",
    MLSys 2021, sections 3 and 4. What differs: d is factored exactly, ranks may differ by one, so
    that budgets are used, start values have the deviation that is asked for, and nothing is cached.

    Attributes:
        cores: m, 2 to 4.
    """

    name: ClassVar[str] = "tt"
    cores: int = 3

    def __post_init__(self) -> None:
        if self.cores not in (2, 3, 4) or isinstance(self.cores, bool):
            raise ValueError(f"cores must be 2, 3 or 4, got {self.cores!r}")

    def layout(self, table: TableSpec) -> TrainLayout:
        """Digits of the ids and columns of a table."""
        return TrainLayout(
            balanced_digits(table.num_embeddings, self.cores),
            balanced_factors(table.embedding_dim, self.cores),
        )

    def sizes(self, table: TableSpec) -> range:
        return self.layout(table).steps(table.num_embeddings * table.embedding_dim)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        layout = self.layout(table)
        return layout.plan(table.num_embeddings, layout.ranks(size), table.dtype)

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """TT-SVD, by which the squared error is at most m - 1 times the least one; then, where
        counts are known, least squares of each core in turn.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        from embcompress.approximation.fitting import fit_stores

        check_finite(weight)
        assert isinstance(plan.head, TensorTrain)
        cores = self.layout(table).decompose(weight.detach().cpu(), plan.head.ranks)
        stores = {f"core_{k}": core for k, core in enumerate(cores)}
        if table.counts is None:
            return stores
        return fit_stores(plan, stores, weight.detach(), table.counts)
