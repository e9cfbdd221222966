"""A full table whose columns, and rows, are multiplied by gates: what searches for sizes train."""

from __future__ import annotations

import torch
from torch import Tensor

from embcompress.methods.base import TableSpec
from embcompress.plan import Digit, LookupPlan, Probe, Store, Weight

WEIGHT, COLUMNS, ROWS = "weight", "column_gates", "row_gates"


def gated_plan(table: TableSpec, rows: bool = False) -> LookupPlan:
    """r[x]·E[x] ⊙ g: gates g of the columns and, where ``rows``, r of the ids; without pooling."""
    n, d = table.num_embeddings, table.embedding_dim
    every = Digit(1, n)
    stores = [Store(WEIGHT, n, d, table.dtype), Store(COLUMNS, 1, d, table.dtype)]
    if rows:
        stores.append(Store(ROWS, n, 1, table.dtype))
    return LookupPlan(
        n,
        d,
        stores=tuple(stores),
        probes=(
            Probe(WEIGHT, every, Weight(ROWS, every) if rows else None),
            Probe(COLUMNS, Digit(1, 1)),
        ),
        combine="mul",
    )


def generator_of(table: TableSpec, number: int) -> torch.Generator:
    """Random numbers of one step of one table, whatever was drawn before."""
    return torch.Generator().manual_seed(table.key(number) >> 1)


def up_to(width: int, columns: int, like: Tensor) -> Tensor:
    """(columns,) gates: 1 for the first ``width`` columns, 0 for the others."""
    return (torch.arange(columns, device=like.device) < width).to(like)
