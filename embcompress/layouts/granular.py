"""The layout of a product-quantized table in which frequent ids have codes of more bits.

Every id has codes of few bits in one table of codes. Where they say "absent", the id is hot: its
codes, of more bits, are in a second table, in the row of a hash of the id. Each row there belongs
to the most frequent of the ids that hash to it, so neither keys nor a map of the ids are stored.
Both tables name codewords of the same codebooks, few bits only the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embcompress.engine.hashing import hash_bucket
from embcompress.engine.rows import unpack_bits
from embcompress.layouts.packing import absent_code, unpack_codes, write_codes
from embcompress.layouts.product import CODES, HOT_CODES, ProductLayout, codebook
from embcompress.methods.base import TableSpec
from embcompress.plan import Address, Code, Digit, Hash, LookupPlan, Store

#: Keys of a table are probes of these numbers: past those of its codes.
_BUCKET, _DRAWN = 100, 101


@dataclass(frozen=True)
class GranularLayout(ProductLayout):
    """Where the parts of vectors with codes of two lengths are.

    Attributes:
        bits: of a code of a hot id.
        tail_bits: of a code of any other id, at most ``bits``.
        bucket: address of the row of an id's codes where the id is hot.
    """

    tail_bits: int = field(kw_only=True)
    bucket: Hash = field(kw_only=True)

    @classmethod
    def of_size(
        cls, table: TableSpec, parts: int, bits: int, tail_bits: int, hot: int
    ) -> GranularLayout:
        """The layout with so many rows, at least 1, for the codes of hot ids."""
        shape, bucket = (table.num_embeddings, table.embedding_dim), Hash(table.key(_BUCKET), hot)
        return cls(*shape, parts, bits, tail_bits=tail_bits, bucket=bucket)

    @classmethod
    def of(cls, plan: LookupPlan) -> GranularLayout:
        stores = {store.name: store for store in plan.stores}
        address = plan.probes[0].address if plan.probes else None
        other = address.otherwise if isinstance(address, Code) else None
        if HOT_CODES in stores and isinstance(other, Code) and isinstance(other.row, Hash):
            shape = (plan.num_embeddings, plan.embedding_dim)
            hot, tail = stores[HOT_CODES], stores[CODES]
            layout = cls(*shape, hot.width, hot.bits, tail_bits=tail.bits, bucket=other.row)
            if plan.with_pool("none") == layout.plan(stores[codebook(0)].dtype):
                return layout
        raise ValueError(f"this is not the plan of a table in codes of two lengths: {plan}")

    @property
    def tail_words(self) -> int:
        """Codewords of a part that codes of few bits name: the first ones of its book."""
        return absent_code(self.tail_bits)

    def address(self, part: int) -> Address:
        hot = Code(HOT_CODES, self.words, self.bucket, part)
        return Code(CODES, self.words, Digit(1, self.num_embeddings), part, otherwise=hot)

    def code_stores(self) -> list[Store]:
        return [
            Store(CODES, self.num_embeddings, self.parts, f"uint{self.tail_bits}"),
            Store(HOT_CODES, self.bucket.buckets, self.parts, f"uint{self.bits}"),
        ]

    # -- codes

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the codes of hot ids."""
        return hash_bucket(ids, self.bucket.key, self.bucket.buckets)

    def are_hot(self, stores: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """(N,) whether the codes of the ids are those of hot ids."""
        first = unpack_bits(stores[CODES], ids * self.parts, self.tail_bits)
        return first == absent_code(self.tail_bits)

    def read_codes(self, stores: Mapping[str, Tensor], first: int, last: int) -> Tensor:
        every = slice(first * self.parts, last * self.parts)
        codes = unpack_codes(stores[CODES], every.start, every.stop, self.tail_bits)
        codes = codes.view(-1, self.parts)
        hot = (codes[:, 0] == absent_code(self.tail_bits)).nonzero().flatten()
        places = self._places(self.rows(hot + first))
        codes[hot] = unpack_bits(stores[HOT_CODES], places, self.bits)
        return codes

    def write_codes(self, stores: Mapping[str, Tensor], ids: Tensor, codes: Tensor) -> None:
        """Write the codes of distinct ids, each where the id has them."""
        hot = self.are_hot(stores, ids)
        places = self._places(self.rows(ids[hot]))
        write_codes(stores[HOT_CODES], places.reshape(-1), codes[hot].reshape(-1), self.bits)
        places = self._places(ids[~hot])
        write_codes(stores[CODES], places.reshape(-1), codes[~hot].reshape(-1), self.tail_bits)

    def make_hot(self, stores: Mapping[str, Tensor], ids: Tensor) -> None:
        """Let ids of distinct rows have the codes in these rows."""
        places = self._places(ids).reshape(-1)
        absent = torch.full_like(places, absent_code(self.tail_bits))
        write_codes(stores[CODES], places, absent, self.tail_bits)

    def _places(self, rows: Tensor) -> Tensor:
        """(N, parts) positions of the codes of rows."""
        return rows[:, None] * self.parts + torch.arange(self.parts, device=rows.device)

    # -- vectors

    def codes_for(self, stores: Mapping[str, Tensor], ids: Tensor, vectors: Tensor) -> Tensor:
        codes = self.encode({name: stores[name][: self.tail_words] for name in self.books}, vectors)
        hot = self.are_hot(stores, ids)
        codes[hot] = self.encode(stores, vectors[hot])
        return codes


def hot_ids(layout: GranularLayout, table: TableSpec, padding_idx: int | None = None) -> Tensor:
    """For every row of the codes of hot ids its id: the most frequent one that hashes to it.

    Ties go to the smaller id; an id that never occurs is not hot, nor is the padding id. Without
    counts a hash draws the id of each row.
    """
    if table.counts is None:
        order = hash_bucket(
            torch.arange(table.num_embeddings), table.key(_DRAWN), 2**63 - 1
        ).argsort(stable=True)
    else:
        counts = table.counts.cpu()
        order = counts.argsort(descending=True, stable=True)
        order = order[counts[order] > 0]
    if padding_idx is not None:
        order = order[order != padding_idx]
    place = torch.arange(order.numel())
    first = torch.full((layout.bucket.buckets,), order.numel())
    first.scatter_reduce_(0, layout.rows(order), place, "amin")
    return order[first[first < order.numel()]]
