"""Tables that keep the rows of some ids, in few columns: the others' vectors are zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embcompress.layouts.packing import absent_code, pack_codes
from embcompress.methods.base import TableSpec
from embcompress.plan import Code, Digit, Linear, LookupPlan, Probe, Store, total_bytes

WEIGHT, CODES, PROJECTION = "weight", "codes", "projection"


@dataclass(frozen=True)
class KeptRows:
    """Which rows and columns of a table are stored.

    Attributes:
        kept: number of ids that have a row; all of them need no codes.
        width: columns of a row; fewer than the table's need a projection.
    """

    kept: int
    width: int

    def plan(self, table: TableSpec) -> LookupPlan:
        """P·E[c(x)], zero for the ids without a row; without pooling."""
        n, d = table.num_embeddings, table.embedding_dim
        stores = [Store(WEIGHT, self.kept, self.width, table.dtype)]
        probe = Probe(WEIGHT, Digit(1, n))
        if self.kept < n:
            stores.append(Store(CODES, n, 1, f"uint{self.kept.bit_length()}"))
            probe = Probe(WEIGHT, Code(CODES, self.kept, Digit(1, n)))
        head = None
        if self.width < d:
            stores.append(Store(PROJECTION, d, self.width, table.dtype))
            head = Linear(PROJECTION)
        return LookupPlan(n, d, tuple(stores), (probe,), head=head)

    def cheapest(self, table: TableSpec) -> KeptRows:
        """The same rows in full width, if that takes no more bytes; else itself.

        Of few rows a projection takes more than it saves.
        """
        wide = KeptRows(self.kept, table.embedding_dim)
        return wide if wide.plan(table).bytes <= self.plan(table).bytes else self

    @classmethod
    def of(cls, plan: LookupPlan) -> KeptRows:
        """What a plan of :meth:`plan` stores."""
        weight = plan.store(WEIGHT)
        return cls(weight.rows, weight.width)


def codes_of(kept: Tensor, num_embeddings: int) -> Tensor:
    """Packed codes that give (K,) distinct ids the rows 0 to K - 1, and the others none."""
    bits = len(kept).bit_length()
    codes = torch.full((num_embeddings,), absent_code(bits), device=kept.device)
    codes[kept] = torch.arange(len(kept), device=kept.device)
    return pack_codes(codes, bits)


def strongest_within(
    tables: Sequence[TableSpec], widths: Sequence[int], margins: Sequence[Tensor], budget: int
) -> list[KeptRows] | None:
    """What each table keeps: rows whose margins are above one common bound.

    Args:
        widths: columns of the rows, for each table; more where they take no more bytes.
        margins: (num_embeddings,) for each table, falling; rows whose margin is not positive are
            never kept, but for the first, because a table has at least one row.
        budget: bytes of all tables.

    Returns:
        What is kept for the smallest bound that the budget allows; None where one row a table
        takes too much.
    """

    def layouts(bound: float) -> list[KeptRows]:
        kept = [max(1, int((margin > bound).sum())) for margin in margins]
        return [
            KeptRows(count, width).cheapest(table)
            for table, count, width in zip(tables, kept, widths, strict=True)
        ]

    def fits(bound: float) -> bool:
        each = zip(tables, layouts(bound), strict=True)
        return total_bytes(layout.plan(table) for table, layout in each) <= budget

    if not fits(math.inf):
        return None
    positive = torch.cat([margin[margin > 0] for margin in margins])
    bounds = [0.0, *positive.unique().tolist(), math.inf]
    low, high = 0, len(bounds) - 1
    if fits(bounds[low]):
        return layouts(bounds[low])
    while high - low > 1:  # the bound at high fits, that at low does not
        middle = (low + high) // 2
        low, high = (low, middle) if fits(bounds[middle]) else (middle, high)
    return layouts(bounds[high])
