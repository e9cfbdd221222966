"""Codes that follow queries: vectors of the ids' own, trained straight through the codes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from embcompress.layouts.product import ProductLayout, codebook
from embcompress.plan import LookupPlan
from embcompress.procedures.base import Observes, TableProcedure, TrainedTable

QUERIES, SQUARES, TOUCHED = "queries", "squares", "touched"
_CHUNK = 1 << 16  # ids
_TINY = 1e-10


class QuerySettings(Protocol):
    """How queries learn; see :class:`embcompress.DifferentiableProductQuantization`."""

    @property
    def query_rate(self) -> float: ...
    @property
    def commitment(self) -> float: ...
    @property
    def pull(self) -> float: ...
    @property
    def temperature(self) -> float | None: ...


class QueryLearning(TableProcedure):
    """Trains a query for every id, whose nearest codewords are the id's codes.

    After every step, for the ids x of its batch, with q their queries and e their vectors::

        q <- q - query_rate * lr * J g / sqrt(sum of mean squares of J g)    row-wise Adagrad
        q <- q + commitment * (e - q)
        codes <- nearest codewords of q
        codeword <- codeword + pull * (mean query of the batch's ids that have it - codeword)

    g is the loss's gradient at e, handed to q straight through the choice of the codeword: J is 1.
    With a temperature it is that of the soft choice Σ softmax(−|q − codeword|² / τ)·codeword
    (:func:`soft_gradients`).

    Its tensors: ``queries``, (num_embeddings, embedding_dim) float32, which start at the table's
    vectors; ``squares``, (num_embeddings,) float32, Adagrad's sums; ``touched``, (num_embeddings,)
    float32, not zero for the ids of the batch.
    """

    observes: Observes = "gradients of vectors"
    averaged = (QUERIES, SQUARES, TOUCHED)

    def __init__(
        self, settings: QuerySettings, layout_type: type[ProductLayout] = ProductLayout
    ) -> None:
        self.settings = settings
        self._layout_type = layout_type
        self._known: tuple[LookupPlan, ProductLayout] | None = None

    def _layout(self, table: TrainedTable) -> ProductLayout:
        """The layout of the table's plan, read once for a plan: that takes longer than a step."""
        plan = table.plan
        if self._known is None or self._known[0] is not plan:
            self._known = plan, self._layout_type.of(plan)
        return self._known[1]

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        plan, stores = table.plan, table.stores()
        layout, device = self._layout(table), stores[codebook(0)].device
        queries = torch.empty(plan.num_embeddings, plan.embedding_dim, device=device)
        for first in range(0, plan.num_embeddings, _CHUNK):
            last = min(first + _CHUNK, plan.num_embeddings)
            codes = layout.read_codes(stores, first, last).clamp(max=layout.words - 1)
            queries[first:last] = layout.decode(stores, codes).detach()
        return {
            QUERIES: queries,
            SQUARES: torch.zeros(plan.num_embeddings, device=device),
            TOUCHED: torch.zeros(plan.num_embeddings, device=device),
        }

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        distinct, place = torch.unique(ids, return_inverse=True)
        gradients = amounts.new_zeros(len(distinct), amounts.shape[1])
        gradients.index_add_(0, place, torch.nan_to_num(amounts, nan=0.0, posinf=0.0, neginf=0.0))
        queries, squares = table.tensor(QUERIES), table.tensor(SQUARES)
        if self.settings.temperature is not None:
            layout, stores = self._layout(table), table.stores()
            gradients = soft_gradients(
                layout, stores, queries[distinct], gradients.float(), self.settings.temperature
            )
        squares[distinct] += gradients.square().mean(1)
        rate = self.settings.query_rate * table.learning_rate(codebook(0))
        queries[distinct] -= gradients * (rate / (squares[distinct].sqrt() + _TINY))[:, None]
        table.tensor(TOUCHED)[distinct] = 1

    def is_due(self, number: int) -> bool:
        return True

    @torch.no_grad()
    def step(self, table: TrainedTable, number: int) -> None:
        layout, stores = self._layout(table), table.stores()
        queries, touched = table.tensor(QUERIES), table.tensor(TOUCHED)
        ids = touched.nonzero().flatten()
        touched.zero_()
        if ids.numel() == 0:
            return
        own = queries[ids]
        if self.settings.commitment > 0:
            chosen = layout.codes_for(stores, ids, own)
            own = own.lerp(layout.decode(stores, chosen), self.settings.commitment)
            queries[ids] = own
        codes = layout.codes_for(stores, ids, own)
        layout.write_codes(stores, ids, codes)
        if self.settings.pull > 0:
            self._pull(layout, stores, codes, own)

    def _pull(
        self, layout: ProductLayout, stores: dict[str, Tensor], codes: Tensor, own: Tensor
    ) -> None:
        """Move codewords towards the queries that chose them."""
        columns = [codes.reshape(-1)] if layout.one_book else codes.unbind(dim=1)
        for name, values, chosen in zip(layout.codebooks, layout.pieces(own), columns, strict=True):
            book = stores[name]
            total = torch.zeros_like(book, dtype=torch.float32).index_add_(
                0, chosen, values.float()
            )
            count = torch.bincount(chosen, minlength=len(book))
            used = count > 0
            mean = total[used] / count[used, None]
            book[used] = book[used].float().lerp(mean, self.settings.pull).to(book.dtype)


def soft_gradients(
    layout: ProductLayout,
    stores: dict[str, Tensor],
    queries: Tensor,
    gradients: Tensor,
    temperature: float,
) -> Tensor:
    """(N, embedding_dim) gradients by the queries of the soft choice of codewords.

    For every part 2/τ·(Σ a·c·(c·g) − m·(m·g)) with a = softmax(−|q − c|²/τ), m = Σ a·c: the
    covariance of the codewords c under the weights a, times the gradient g.

    Args:
        queries, gradients: (N, embedding_dim) float32.
        temperature: τ by the codebook's mean squared distance of a codeword to the next one.
    """
    results = []
    pieces = zip(layout.codebooks, layout.pieces(queries), layout.pieces(gradients), strict=True)
    for name, query, gradient in pieces:
        book = stores[name].detach().float()
        tau = temperature * _spacing(book)
        weights = torch.softmax(-torch.cdist(query, book).square() / tau, dim=1)
        along = gradient @ book.T  # (N, words)
        mean = (weights * along).sum(1, keepdim=True)
        soft = (weights * (along - mean)) @ book * (2 / tau)
        results.append(soft.view(len(queries), -1))
    return torch.cat(results, dim=1)


def _spacing(book: Tensor) -> Tensor:
    """Mean squared distance of a codeword to the nearest other one."""
    distances = torch.cdist(book, book).fill_diagonal_(torch.inf)
    nearest = distances.min(1).values
    return nearest[nearest.isfinite()].square().mean().nan_to_num(1.0).clamp(min=_TINY)
