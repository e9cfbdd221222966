"""Widths of tables, searched on validation examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.methods import register
from embcompress.methods.base import JointMethod, TableSpec
from embcompress.methods.full import Full
from embcompress.methods.low_dim import LowDim
from embcompress.plan import LookupPlan, total_bytes
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.gated_table import COLUMNS, WEIGHT, gated_plan
from embcompress.procedures.phases import Phase, PhasedTable, Score, TableForm
from embcompress.procedures.width_search import LOGITS, WidthSearch, choose_sizes

_SEARCH, _RETRAIN = "search", "retrain"


@register
@dataclass(frozen=True)
class AutoDim(JointMethod):
    """Widths searched by gradients, P·E[x] with a width for every table that the data chooses.

    Training has two phases. In the search every table is full, and its columns are multiplied by
    gates: column w by Σ y_j over the candidate widths d_j > w, so that an id reads the mixture
    Σ y_j·(its first d_j columns). The weights y are a Gumbel-softmax sample of logits, which learn
    from validation examples while the rows learn from training examples. Then those widths are
    taken that have the largest Σ log p under the common budget, p being the logits' softmax, and
    narrow rows with projections are trained from start values. Without phases tables have about the
    same width.

    Memory: n·w + d·w numbers for a table of width w, n·d for one as wide as d. In the search all
    tables are full and have d gates more.

    Source: Zhao et al., "AutoDim: field-aware embedding dimension search in recommender systems",
    WWW 2021 (arXiv 2006.14827), with shared weights (candidates are the first columns of one row)
    and first-order steps. There every candidate passes a linear map and batch normalization before
    it is mixed; here the columns are mixed as they are, and the projection is a part of what is
    retrained. There each table takes the width of its largest weight, whatever the sum.

    Attributes:
        epochs: passes of the search.
        rate: learning rate of the logits, by Adam.
        temperature: of the Gumbel softmax at first.
        annealing: what it loses with every step; it does not fall below 0.01.
    """

    name: ClassVar[str] = "autodim"
    searches_plans: ClassVar[bool] = True
    epochs: int = 1
    rate: float = 0.03
    temperature: float = 1.0
    annealing: float = 5e-5

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not self.rate > 0 or not self.temperature > 0 or self.annealing < 0:
            raise ValueError(
                "rate and temperature must be positive and annealing not negative, got "
                f"{self.rate}, {self.temperature}, {self.annealing}"
            )

    # -- the plan

    @staticmethod
    def widths(table: TableSpec) -> list[int]:
        """The widths that a table may have: those that take less than all of it, and its own."""
        n, d = table.num_embeddings, table.embedding_dim
        return [*range(1, min(d, -(-n * d // (n + d)))), d]

    def candidates_of(self, table: TableSpec) -> tuple[int, ...]:
        """The widths that the search mixes: powers of two, and the table's own."""
        widths = self.widths(table)
        return tuple(w for w in widths if w & (w - 1) == 0 or w == table.embedding_dim)

    def group_sizes(self, tables: Sequence[TableSpec]) -> range:
        """Numbers of columns that tables have beyond the first."""
        return range(1 + sum(len(self.widths(table)) - 1 for table in tables))

    def group_plans(self, tables: Sequence[TableSpec], size: int) -> list[LookupPlan]:
        """All tables get their second column, then the third, …, the smaller ones first."""
        steps = [
            (place, table.num_embeddings, index)
            for index, table in enumerate(tables)
            for place in range(1, len(self.widths(table)))
        ]
        places = [0] * len(tables)
        for _, _, index in sorted(steps)[:size]:
            places[index] += 1
        return [
            self._plan(table, self.widths(table)[place])
            for table, place in zip(tables, places, strict=True)
        ]

    @staticmethod
    def _plan(table: TableSpec, width: int) -> LookupPlan:
        if width == table.embedding_dim:
            return Full().plan(table, table.num_embeddings)
        return LowDim().plan(table, width)

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """The best approximation of the plan's width, by the singular vectors of the table.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        if plan.head is None:
            return Full().fit(table, plan, weight)
        return LowDim().fit(table, plan, weight)

    # -- training

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(_SEARCH, self.epochs, split="validation"),
            Phase(_RETRAIN, weights="initial"),
        )

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        return WidthSearch(self) if phase.name == _SEARCH else None

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        if phase.name == _SEARCH:
            return [self._gated(table) for table in tables]
        options = []
        for table in tables:
            scores = table.tensor(LOGITS).double().log_softmax(0).tolist()
            candidates = self.candidates_of(table.spec)
            sizes = [self._plan(table.spec, width).bytes for width in candidates]
            options.append(dict(zip(candidates, zip(sizes, scores, strict=True), strict=True)))
        widths = choose_sizes(options, total_bytes(table.built for table in tables))
        plans = [self._plan(t.spec, width) for t, width in zip(tables, widths, strict=True)]
        return [
            TableForm(plan, table.new_stores(plan))
            for table, plan in zip(tables, plans, strict=True)
        ]

    @staticmethod
    def _gated(table: PhasedTable) -> TableForm:
        spec = table.spec
        stores = table.new_stores(Full().plan(spec, spec.num_embeddings))
        stores[COLUMNS] = torch.ones_like(stores[WEIGHT][:1])
        return TableForm(gated_plan(spec), stores, frozen=(COLUMNS,))
