"""Codes that are learned while the codebooks are."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from embcompress.layouts.product import ProductLayout, codebook
from embcompress.procedures.base import Observes, TableProcedure, TrainedTable

STEPS, SQUARES, MOVES, BEFORE = "steps", "squares", "moves", "before_"
_CHUNK = 1 << 16  # ids


class CodeLearningSettings(Protocol):
    """How codes are learned; see :class:`embcompress.ProductQuantization`."""

    @property
    def interval(self) -> int: ...
    @property
    def code_rate(self) -> float: ...


class CodeLearning(TableProcedure):
    """Moves the codes of a product-quantized table to where their ids' gradients want to go.

    Every id has a wish: how far its vector would have moved in row-wise Adagrad steps of its own,
    less what its codewords have moved meanwhile. Every ``interval`` steps it gets the codewords
    nearest to its vector plus its wish, and keeps the rest of the wish (error feedback). With an
    interval of 1 and codewords that stand still, this is the straight-through estimator.

    Its tensors: ``steps``, (num_embeddings, embedding_dim) float32, the wishes; ``squares``,
    (num_embeddings,) float32, Adagrad's sums; ``before_…``, the codewords at the last step;
    ``moves``, how many codes have changed.
    """

    observes: Observes = "gradients of vectors"
    averaged = (STEPS, SQUARES)

    def __init__(self, settings: CodeLearningSettings) -> None:
        self.settings = settings

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        plan, books = table.plan, self._books(table)
        device = books[codebook(0)].device
        before = {BEFORE + name: book.detach().float().clone() for name, book in books.items()}
        return {
            STEPS: torch.zeros(plan.num_embeddings, plan.embedding_dim, device=device),
            SQUARES: torch.zeros(plan.num_embeddings, device=device),
            MOVES: torch.zeros((), dtype=torch.int64, device=device),
            **before,
        }

    @staticmethod
    def _books(table: TrainedTable) -> dict[str, Tensor]:
        stores = table.stores()
        return {name: stores[name] for name in ProductLayout.of(table.plan).books}

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        distinct, place = torch.unique(ids, return_inverse=True)
        gradients = amounts.new_zeros(len(distinct), amounts.shape[1])
        gradients.index_add_(0, place, torch.nan_to_num(amounts, nan=0.0, posinf=0.0, neginf=0.0))
        squares = table.tensor(SQUARES)
        squares[distinct] += gradients.square().mean(1)
        rate = self.settings.code_rate * table.learning_rate(codebook(0))
        scale = rate / (squares[distinct].sqrt() + 1e-10)
        table.tensor(STEPS)[distinct] -= gradients * scale[:, None]

    def is_due(self, number: int) -> bool:
        return number % self.settings.interval == 0

    def step(self, table: TrainedTable, number: int) -> None:
        layout, stores = ProductLayout.of(table.plan), table.stores()
        books = {name: book.detach().float() for name, book in self._books(table).items()}
        before = {name: table.tensor(BEFORE + name) for name in books}
        wishes, seen = table.tensor(STEPS), table.tensor(SQUARES) > 0
        for first in range(0, layout.num_embeddings, _CHUNK):
            last = min(first + _CHUNK, layout.num_embeddings)
            old = layout.read_codes(stores, first, last)
            # An absent vector is dropped for good.
            own = (seen[first:last] & ~layout.are_absent(old)).nonzero().flatten()
            if own.numel() == 0:
                continue
            old, ids = old[own], own + first
            wanted = layout.decode(before, old) + wishes[ids]
            new = layout.encode(books, wanted)
            wishes[ids] = wanted - layout.decode(books, new)
            layout.write_codes(stores, ids, new)
            table.tensor(MOVES).add_((new != old).sum())
        for name, book in books.items():
            before[name].copy_(book)
