"""The layout of a table in which some ids own rows and the others share fallback rows.

The fallback rows come first in the store. A packed code for every id is the row that it owns;
"absent" sends it to one of the fallback rows, or, where there are none, makes its vector zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embcompress.engine.rows import address_rows
from embcompress.layouts.packing import absent_code, pack_codes, unpack_codes, write_codes
from embcompress.plan import Code, Digit, DirectAddress, LookupPlan, Probe, Slot, Store

#: Codes have 32 bits at most, and one of them is "absent".
MOST_ROWS = 2**32 - 1
WEIGHT, CODES = "weight", "codes"
_CHUNK = 1 << 16


@dataclass(frozen=True)
class PrunedLayout:
    """Where the rows of a pruned table are.

    Attributes:
        num_embeddings, embedding_dim: of the table.
        kept: number of ids that own a row.
        fallback: which of the first ``fallback.size`` rows an id reads that owns none; None: its
            vector is zero, and there are no fallback rows.
    """

    num_embeddings: int
    embedding_dim: int
    kept: int
    fallback: DirectAddress | None

    @classmethod
    def of(cls, plan: LookupPlan) -> PrunedLayout:
        """The layout of a plan that :meth:`plan` made.

        Raises:
            ValueError: another kind of plan.
        """
        address = plan.probes[0].address
        if isinstance(address, Code) and not isinstance(address.otherwise, Code | Slot):
            fallback = address.otherwise
            kept = address.size - (0 if fallback is None else fallback.size)
            layout = cls(plan.num_embeddings, plan.embedding_dim, kept, fallback)
            if plan.with_pool("none") == layout.plan(plan.stores[0].dtype):
                return layout
        raise ValueError(f"this is not the plan of a pruned table: {plan}")

    @property
    def shared(self) -> int:
        """Number of fallback rows."""
        return 0 if self.fallback is None else self.fallback.size

    @property
    def rows(self) -> int:
        """Rows of the store."""
        return self.shared + self.kept

    @property
    def bits(self) -> int:
        """Bits of a code: the fewest that number the rows and leave one for "absent"."""
        return self.rows.bit_length()

    def plan(self, dtype: str) -> LookupPlan:
        """The plan, without pooling, with rows in this dtype."""
        everyone = Digit(1, self.num_embeddings)
        return LookupPlan(
            self.num_embeddings,
            self.embedding_dim,
            stores=(
                Store(WEIGHT, self.rows, self.embedding_dim, dtype),
                Store(CODES, self.num_embeddings, 1, f"uint{self.bits}"),
            ),
            probes=(Probe(WEIGHT, Code(CODES, self.rows, everyone, 0, self.fallback)),),
        )

    # -- codes

    def codes(self, kept: Tensor) -> Tensor:
        """Packed codes that give (kept,) ids the rows after the fallback's, in their order."""
        codes = torch.full((self.num_embeddings,), absent_code(self.bits), device=kept.device)
        codes[kept] = torch.arange(self.shared, self.rows, device=kept.device)
        return pack_codes(codes, self.bits)

    def owned_rows(self, packed: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """The rows that the ids from ``start`` to ``end`` own, int64; -1 where they own none."""
        end = self.num_embeddings if end is None else end
        codes = unpack_codes(packed, start, end, self.bits)
        return codes.masked_fill_(codes >= self.rows, -1)

    def set_owned_rows(self, packed: Tensor, ids: Tensor, rows: Tensor) -> None:
        """Give distinct ids other rows, in place; -1 takes theirs away."""
        codes = torch.where(rows < 0, absent_code(self.bits), rows)
        write_codes(packed, ids, codes, self.bits)

    def kept_ids(self, packed: Tensor) -> Tensor:
        """(kept,) ids in the order of their rows."""
        rows = self.owned_rows(packed)
        ids = (rows >= 0).nonzero().flatten()
        return ids[rows[ids].argsort()]

    # -- the fallback

    def fallback_rows(self, ids: Tensor) -> Tensor:
        """Which fallback rows the ids read where they own no row; there must be some."""
        assert self.fallback is not None
        return address_rows(self.fallback, ids, self.plan("float32"), {})[0]

    def mean_fallback(self, weight: Tensor, kept: Tensor, counts: Tensor | None = None) -> Tensor:
        """Fallback rows that are nearest to the vectors of the ids that are not kept.

        Args:
            weight: (num_embeddings, embedding_dim) float.
            kept: (kept,) ids.
            counts: (num_embeddings,) weights of the ids, or None for equal ones.

        Returns:
            (fallback rows, embedding_dim) of the weight's dtype: the means of the vectors that
            read them; the mean of all pruned vectors for a row that nobody reads; zero where
            nothing is pruned. Where no pruned id has a count, they weigh the same.
        """
        shares = torch.ones(self.num_embeddings, dtype=torch.float64, device=weight.device)
        if counts is not None:
            counted = counts.to(shares).index_fill(0, kept, 0)
            shares = counted if bool((counted > 0).any()) else shares
        shares = shares.index_fill(0, kept, 0)
        sums = shares.new_zeros(self.shared, self.embedding_dim)
        totals = shares.new_zeros(self.shared, 1)
        for start in range(0, self.num_embeddings, _CHUNK):
            share = shares[start : start + _CHUNK, None]
            ids = torch.arange(start, start + share.numel(), device=weight.device)
            rows = self.fallback_rows(ids)
            sums.index_add_(0, rows, weight[start : start + _CHUNK].double() * share)
            totals.index_add_(0, rows, share)
        tiny = torch.finfo(torch.float64).tiny
        overall = sums.sum(0) / totals.sum().clamp(min=tiny)
        means = torch.where(totals > 0, sums / totals.clamp(min=tiny), overall)
        return means.to(weight.dtype)
