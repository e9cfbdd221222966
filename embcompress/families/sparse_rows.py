"""Tables of sparse rows, one for every id: what the methods that find them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.layouts.sparse import (
    clear_pruned,
    full_mask,
    mask_of_largest,
    sparse_store,
)
from embcompress.methods.base import Method, TableSpec
from embcompress.methods.full import Full
from embcompress.plan import MOST_STORED, Digit, LookupPlan, Probe
from embcompress.procedures.phases import Phase, PhasedTable, Score, TableForm

WEIGHT = "weight"
INDEX = f"{WEIGHT}_index"


def best_mask(plan: LookupPlan, scores: Tensor, name: str = WEIGHT) -> Tensor:
    """The mask of a sparse store that keeps its numbers of largest score, (rows, width) float."""
    sparsity = plan.store(name).sparsity
    assert sparsity is not None
    return mask_of_largest(scores, sparsity.stored)


def kept_stores(
    plan: LookupPlan, weight: Tensor, mask: Tensor, name: str = WEIGHT
) -> dict[str, Tensor]:
    """Latents of a sparse store, (rows, width) float, with what the mask keeps; and the mask."""
    store = plan.store(name)
    assert store.sparsity is not None
    latents = weight.detach().clone()
    clear_pruned(latents, mask, store)
    return {name: latents, store.sparsity.index: mask}


def with_starts(plan: LookupPlan, stores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stores and the starts of sparse ones, which latents have no use for."""
    device = next(iter(stores.values())).device
    for store in plan.stores:
        if store.name not in stores:
            stores[store.name] = torch.zeros(store.bytes, dtype=torch.uint8, device=device)
    return stores


class SparseRows(Method):
    """A method that keeps some numbers of every row in the end; the dial says how many in all.

    It has two phases: :meth:`search` tells in the first one what the table is trained as, and
    :meth:`final` in the second what is kept of it.
    """

    def sizes(self, table: TableSpec) -> range:
        """How many numbers are kept."""
        return range(1, min(table.num_embeddings * table.embedding_dim, MOST_STORED) + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        rows, width = table.num_embeddings, table.embedding_dim
        return LookupPlan(
            rows,
            width,
            stores=sparse_store(WEIGHT, rows, width, size, table.dtype),
            probes=(Probe(WEIGHT, Digit(1, rows)),),
        )

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """The numbers of largest magnitude; with counts, weighted by their roots.

        So the squared error of the vectors, weighted by counts, is the smallest there is.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        scores = weight.detach().abs()
        if table.counts is not None:  # an id that was never seen counts a little
            scores = scores * (table.counts.to(scores) + 0.1).sqrt()[:, None]
        return kept_stores(plan, weight, best_mask(plan, scores))

    @abstractmethod
    def phases(self) -> tuple[Phase, Phase]:
        """The search, and the training of what it keeps."""

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        if phase == self.phases()[0]:
            return [self.search(table) for table in tables]
        return [self.final(table) for table in tables]

    @abstractmethod
    def search(self, table: PhasedTable) -> TableForm:
        """What a table is trained as in the first phase."""

    @abstractmethod
    def final(self, table: PhasedTable) -> TableForm:
        """What is kept of it."""


def full_weight(table: PhasedTable) -> Tensor:
    """(num_embeddings, embedding_dim) start values of the full table."""
    plan = Full().plan(table.spec, table.spec.num_embeddings)
    (weight,) = table.new_stores(plan).values()
    return weight


def unpruned_form(table: PhasedTable) -> TableForm:
    """The plan that the table was built with, with start values and a mask that keeps all."""
    plan, weight = table.built, full_weight(table)
    mask = full_mask(plan.store(WEIGHT), weight.device)
    return TableForm(plan, with_starts(plan, {WEIGHT: weight, INDEX: mask}))


def final_form(table: PhasedTable, weight: Tensor, mask: Tensor) -> TableForm:
    """The plan that the table was built with, with the numbers that a mask keeps."""
    plan = table.built
    return TableForm(plan, with_starts(plan, kept_stores(plan, weight, mask)))
