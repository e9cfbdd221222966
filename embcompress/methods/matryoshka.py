"""Nested widths, trained together and cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.approximation.fitting import principal_directions
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.methods.full import Full
from embcompress.plan import Digit, Linear, LookupPlan, Probe, Store
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.nested_dropout import MASK, NestedDropout
from embcompress.procedures.phases import Phase, PhasedTable, Score, TableForm

if TYPE_CHECKING:
    from embcompress.tables.compressed_table import CompressedTable

TableType = TypeVar("TableType", bound="CompressedTable")


@register
@dataclass(frozen=True)
class Matryoshka(Method):
    """Nested widths, P·E[x]₁…w: rows whose first w columns serve for any w, cut to the budget.

    Two phases. While ``nested``, the table has all d columns, and every step sees the first m of
    them, m drawn from the nested widths; the others are zero. So the layers learn to read every
    width, and what matters most moves to the front. Then the table is ``cut`` to the w columns
    that the budget allows, with a projection that starts as d − w columns of zeros, and both are
    trained on. :meth:`cut` makes narrower tables of a trained one, without training.

    Memory: n·w + d·w numbers, w from 1 to d. Training holds the full table, n·d + d
    numbers, in its first phase.

    Source: Kusupati et al., "Matryoshka representation learning", NeurIPS 2022, section 3 (the
    variant whose layers share their weights for all widths, MRL-E); a width is drawn as in Rippel
    et al., "Learning ordered representations with nested dropout", ICML 2014, section 3. What
    differs: Kusupati adds up the losses of all widths, which takes as many passes; a step here
    draws one of them, evenly, so that a table is trained by the same loop as any other.

    Attributes:
        nested_epochs: passes over the training examples with nested widths.
        widths: that are drawn, beside d and, under a budget, w; None: the powers of two below d.
        seed: of the draws.
    """

    name: ClassVar[str] = "matryoshka"
    nested_epochs: int = 2
    widths: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.nested_epochs < 1:
            raise ValueError(f"nested_epochs must be at least 1, got {self.nested_epochs}")
        if self.widths is not None and any(width < 1 for width in self.widths):
            raise ValueError(f"widths must be at least 1, got {self.widths}")

    def sizes(self, table: TableSpec) -> range:
        return range(1, table.embedding_dim + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        rows, width = table.num_embeddings, table.embedding_dim
        stores = (
            Store("weight", rows, size, table.dtype),
            Store("projection", width, size, table.dtype),
        )
        probes = (Probe("weight", Digit(1, rows)),)
        return LookupPlan(rows, width, stores, probes, head=Linear("projection"))

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """The leading singular vectors of the table, which are nested by themselves.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        directions = principal_directions(weight.detach(), plan.width, table.counts)
        return {"weight": weight.detach() @ directions, "projection": directions}

    # -- phases

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("nested", self.nested_epochs), Phase("cut"))

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        if phase.name != "nested":
            return None
        return NestedDropout(self.widths or tuple(2**k for k in range(31)), self.seed)

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        begin = self._nested_form if phase.name == "nested" else self._cut_form
        return [begin(table) for table in tables]

    def _nested_form(self, table: PhasedTable) -> TableForm:
        """The full table, times a mask of its columns."""
        full = Full().plan(table.spec, table.spec.num_embeddings)
        (rows,) = full.probes
        mask = Store(MASK, 1, full.embedding_dim, table.spec.dtype)
        plan = replace(
            full,
            stores=(*full.stores, mask),
            probes=(rows, Probe(MASK, Digit(1, 1))),
            combine="mul",
        )
        stores = table.new_stores(full)
        weight = stores[rows.store]
        return TableForm(plan, {**stores, MASK: torch.ones_like(weight[:1])}, frozen=(MASK,))

    def _cut_form(self, table: PhasedTable) -> TableForm:
        """The first columns of the nested table, under the budget."""
        plan, weight = table.built, table.stores()["weight"].detach()
        first = torch.eye(plan.embedding_dim, dtype=weight.dtype, device=weight.device)
        width = plan.width
        return TableForm(
            plan,
            {"weight": weight[:, :width].clone(), "projection": first[:, :width].contiguous()},
        )

    # -- serving

    @staticmethod
    def cut(table: TableType, width: int) -> TableType:
        """A copy of a trained table with its first columns alone; nothing is trained.

        Args:
            table: of this method, or a full table that was trained nested.
            width: columns to keep, 1 to those that there are.

        Returns:
            A table whose vectors are those of the table with its later columns set to zero.

        Raises:
            ValueError: a table of another layout, or a width that it does not have.
        """
        from embcompress.cutting import cut_columns

        return cut_columns(table, width)
