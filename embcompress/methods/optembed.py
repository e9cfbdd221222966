"""Rows and widths of tables: thresholds learned in a supernet, widths found by evolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.importance import strongest
from embcompress.layouts.kept_rows import (
    CODES,
    PROJECTION,
    WEIGHT,
    KeptRows,
    codes_of,
    strongest_within,
)
from embcompress.layouts.pruned import MOST_ROWS
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.methods.full import Full
from embcompress.methods.pruned import Pruned
from embcompress.plan import LookupPlan, total_bytes
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.evolution import Evolution, Genes
from embcompress.procedures.gated_table import COLUMNS, ROWS, gated_plan, generator_of, up_to
from embcompress.procedures.phases import Phase, PhasedTable, Score, TableForm
from embcompress.procedures.row_thresholds import THRESHOLD, RowThresholds, row_norms

_SUPERNET, _RETRAIN = "supernet", "retrain"
#: Number of the key that the evolution draws by; it is far from those of steps.
_EVOLUTION = 2**32 - 2


@register
@dataclass(frozen=True)
class OptEmbed(Method):
    """Rows kept by learned thresholds, widths by evolution, P·E[c(x)]; other ids are zero.

    Training has two phases. In the first a supernet is trained: full tables, in which a row counts
    as zero while its norm ‖E[x]‖₁ is below the table's threshold, and of which every batch sees
    another number of columns. The thresholds are learned with the rows
    (:class:`embcompress.procedures.row_thresholds.RowThresholds`).

    Then evolution looks for the widths with which the supernet scores best on validation examples,
    without further training. To widths belong rows: those above the thresholds or, where these do
    not fit the budget, those with the largest ‖E[x]‖₁ − t in all tables together. In the second
    phase the rows and columns that were chosen are trained from their start values in the first; P
    begins as the first columns of the identity. Without phases tables keep the rows of frequent
    ids.

    Memory: k·w + d·w numbers for k kept ids of width w, and ⌈log2(k + 1)⌉ bits an id; no projection
    where w = d, and no codes where all ids are kept. In the first phase tables are full, and have
    n + d gates more.

    Source: Lyu et al., "OptEmbed: learning optimal embedding table for click-through rate
    prediction", CIKM 2022. There is no budget there: thresholds and widths fall out as they do.
    What makes thresholds rise is there a term of the loss; here its slope is added to their
    gradient. The paper evolves for 30 generations.

    Attributes:
        epochs: passes of the first phase.
        rate: learning rate of the thresholds.
        pressure: λ of the term λ·e^{−t} that makes them rise.
        generations: of the evolution, after a random one.
        mutations, crossovers: children of either kind in a generation; each costs one score.
        parents: how many of the best widths children come from.
        mutation_rate: probability that a child's width of a table is drawn anew.
    """

    name: ClassVar[str] = "optembed"
    searches_plans: ClassVar[bool] = True
    epochs: int = 1
    rate: float = 0.03
    pressure: float = 1e-3
    generations: int = 5
    mutations: int = 10
    crossovers: int = 10
    parents: int = 10
    mutation_rate: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("generations", 0), ("mutations", 1), ("crossovers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.parents < 1:
            raise ValueError(f"parents must be at least 1, got {self.parents}")
        if not self.rate > 0 or self.pressure < 0 or not 0 < self.mutation_rate <= 1:
            raise ValueError(
                "rate must be positive, pressure not negative and mutation_rate in (0, 1], got "
                f"{self.rate}, {self.pressure}, {self.mutation_rate}"
            )

    # -- the plan

    def sizes(self, table: TableSpec) -> range:
        """Numbers of kept ids."""
        return range(1, min(table.num_embeddings, MOST_ROWS - 1) + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        """Kept rows of the full width, or the full table where that takes no more."""
        full = KeptRows(table.num_embeddings, table.embedding_dim).plan(table)
        plan = KeptRows(size, table.embedding_dim).plan(table)
        return plan if plan.bytes < full.bytes else full

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        """The most frequent ids, or without counts some by a keyed hash."""
        if CODES in stores and stores[CODES].device.type != "meta":
            kept = KeptRows.of(plan).kept
            ids = Pruned().choose(table, kept, plan.padding_idx, stores[CODES].device)
            stores[CODES].copy_(codes_of(ids, table.num_embeddings))

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """The rows of the largest norm, times the root of the id's count where that is known.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        if plan.is_dense:
            return {WEIGHT: weight.detach()}
        importance = weight.detach().double().square().sum(1)
        if table.counts is not None:
            importance = importance * table.counts.to(importance)
        kept = strongest(importance, KeptRows.of(plan).kept).sort().values
        return {WEIGHT: weight.detach()[kept], CODES: codes_of(kept, table.num_embeddings)}

    # -- training

    def phases(self) -> tuple[Phase, ...]:
        return Phase(_SUPERNET, self.epochs), Phase(_RETRAIN, weights="initial")

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        return RowThresholds(self) if phase.name == _SUPERNET else None

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        if phase.name == _SUPERNET:
            return [_gated(table) for table in tables]
        if score is None:
            raise ValueError(
                "method 'optembed' compares widths by validation scores; pass a function that "
                "gives them: procedure.begin_phase(score)"
            )
        supernet = _Supernet(tables)
        widths = self._evolve(supernet, score)
        chosen = supernet.chosen(widths)
        assert chosen is not None
        return [
            _narrow(table, width, ids) for table, (width, ids) in zip(tables, chosen, strict=True)
        ]

    def _evolve(self, supernet: _Supernet, score: Score) -> Genes:
        evolution = Evolution(
            self.generations, self.mutations, self.crossovers, self.parents, self.mutation_rate
        )
        most = [table.spec.embedding_dim for table in supernet.tables]
        powers = [1 << k for k in range(max(most).bit_length())]
        alike = [tuple(min(width, last) for last in most) for width in powers]
        generator = generator_of(supernet.tables[0].spec, _EVOLUTION)
        best = evolution.best(most, supernet.scored(score), generator, [*alike, tuple(most)])
        return tuple(1 for _ in most) if best is None else best


class _Supernet:
    """Trained gated tables, of which rows and columns are chosen."""

    def __init__(self, tables: Sequence[PhasedTable]) -> None:
        self.tables = tables
        self.budget = total_bytes(table.built for table in tables)
        norms = [row_norms(table.stores()[WEIGHT]) for table in tables]
        self._order = [each.argsort(descending=True, stable=True) for each in norms]
        self._margins = [
            (norm - table.tensor(THRESHOLD))[order].cpu()
            for table, norm, order in zip(tables, norms, self._order, strict=True)
        ]

    def chosen(self, widths: Sequence[int]) -> list[tuple[int, Tensor]] | None:
        """Width and ids, rising, that each table keeps; None if these widths do not fit.

        A table whose projection would take more than it saves gets its full width.
        """
        specs = [table.spec for table in self.tables]
        layouts = strongest_within(specs, widths, self._margins, self.budget)
        if layouts is None:
            return None
        return [
            (layout.width, order[: layout.kept].sort().values)
            for order, layout in zip(self._order, layouts, strict=True)
        ]

    def scored(self, score: Score) -> Callable[[Genes], float | None]:
        """The score of the model when its tables have some widths."""

        def score_of(widths: Genes) -> float | None:
            chosen = self.chosen(widths)
            if chosen is None:
                return None
            for table, (width, ids) in zip(self.tables, chosen, strict=True):
                columns, rows = table.stores()[COLUMNS], table.stores()[ROWS]
                columns.copy_(up_to(width, columns.shape[1], columns)[None])
                rows.zero_().index_fill_(0, ids, 1.0)
            return score()

        return score_of


def _gated(table: PhasedTable) -> TableForm:
    spec = table.spec
    stores = table.new_stores(Full().plan(spec, spec.num_embeddings))
    stores[COLUMNS] = torch.ones_like(stores[WEIGHT][:1])
    stores[ROWS] = torch.ones_like(stores[WEIGHT][:, :1])
    return TableForm(gated_plan(spec, rows=True), stores, frozen=(COLUMNS, ROWS))


def _narrow(table: PhasedTable, width: int, ids: Tensor) -> TableForm:
    """Rows of some ids and the first columns, at the start values of the full table."""
    spec = table.spec
    plan = KeptRows(len(ids), width).plan(spec)
    start = table.new_stores(Full().plan(spec, spec.num_embeddings))[WEIGHT]
    stores = {WEIGHT: start[ids, :width].contiguous()}
    for store in plan.stores:
        if store.name == CODES:
            stores[CODES] = codes_of(ids, spec.num_embeddings)
        if store.name == PROJECTION:
            identity = torch.eye(spec.embedding_dim, dtype=start.dtype, device=start.device)
            stores[PROJECTION] = identity[:, :width].contiguous()
    return TableForm(plan, stores)
