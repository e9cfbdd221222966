"""The layout of a table in which hot ids own rows that are found in slots, and the others share.

The shared rows come first in the store of rows. Each slot of the store of keys owns one of the rows
behind them; the ids that a bucket has room for are those that hash to it. So the keys take memory
by the number of hot rows, not by the number of ids, unlike :mod:`embcompress.layouts.pruned`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embcompress.engine.hashing import hash_bucket
from embcompress.engine.rows import address_rows
from embcompress.importance import strongest
from embcompress.layouts.packing import absent_code, pack_codes, write_codes
from embcompress.methods.base import TableSpec
from embcompress.plan import Digit, DirectAddress, Hash, LookupPlan, Slot, Store

WEIGHT, KEYS = "weight", "keys"
#: Keys of a table are probes of these numbers: past those of its rows.
_BUCKET, _TAG, _DRAWN = 100, 101, 102
_MOST_BITS = 32


@dataclass(frozen=True)
class SlotLayout:
    """Where the rows of a table with slots are.

    Attributes:
        num_embeddings: ids are in ``[0, num_embeddings)``.
        shared: rows that ids without a slot share.
        bucket: address of an id's bucket.
        ways: slots of a bucket.
        tag: what a slot holds of an id.
    """

    num_embeddings: int
    shared: int
    bucket: Hash
    ways: int
    tag: DirectAddress

    @classmethod
    def of_size(cls, table: TableSpec, rows: int, hot: float, ways: int) -> SlotLayout:
        """The layout of so many rows, at least 2, of which about the share ``hot`` have slots.

        Slots hold the ids themselves, in the fewest bits; past 32 bits, 32 bits of a hash.
        """
        ways = max(1, min(ways, rows // 2))
        buckets = max(1, int(hot * rows) // ways)
        return cls._of_buckets(table, rows - buckets * ways, buckets, ways)

    @classmethod
    def without_shared(cls, table: TableSpec, rows: int, ways: int) -> SlotLayout:
        """The layout of at most so many rows, at least 1, all of which have slots.

        Few rows get up to twice the ways, so that buckets leave few of them out.
        """
        choices = [ways]
        if rows < 16 * ways:
            choices = [*range(min(ways, rows), min(2 * ways, rows + 1))]
        ways = max(choices, key=lambda each: rows // each * each)
        return cls._of_buckets(table, 0, rows // ways, ways)

    @classmethod
    def _of_buckets(cls, table: TableSpec, shared: int, buckets: int, ways: int) -> SlotLayout:
        tag: DirectAddress = Digit(1, table.num_embeddings)
        if table.num_embeddings.bit_length() > _MOST_BITS:
            tag = Hash(table.key(_TAG), 2**_MOST_BITS - 1)
        bucket = Hash(table.key(_BUCKET), buckets)
        return cls(table.num_embeddings, shared, bucket, ways, tag)

    @classmethod
    def of(cls, plan: LookupPlan) -> SlotLayout:
        """The layout of a plan whose first probe goes by slots.

        Raises:
            ValueError: another kind of plan.
        """
        address = plan.probes[0].address
        if not isinstance(address, Slot) or not isinstance(address.bucket, Hash):
            raise ValueError(f"this is not the plan of a table with slots: {plan}")
        ways = plan.store(address.store).width
        return cls(plan.num_embeddings, address.first, address.bucket, ways, address.tag)

    @property
    def hot(self) -> int:
        """Number of slots."""
        return self.bucket.buckets * self.ways

    @property
    def rows(self) -> int:
        """Rows of the store of rows."""
        return self.shared + self.hot

    @property
    def bits(self) -> int:
        """Bits of a key: the fewest that hold the tags and "empty"."""
        return self.tag.size.bit_length()

    def key_store(self) -> Store:
        """The store of keys."""
        return Store(KEYS, self.bucket.buckets, self.ways, f"uint{self.bits}")

    def address(self, otherwise: DirectAddress, size: int | None = None) -> Slot:
        """The address that is an id's own row, or ``otherwise``.

        Args:
            otherwise: one of the shared rows.
            size: rows that may be read; with ``shared`` a hot id reads zero.
        """
        size = self.rows if size is None else size
        return Slot(KEYS, size, self.bucket, self.tag, otherwise, self.shared)

    # -- keys

    def tags(self, ids: Tensor) -> Tensor:
        """What slots hold of the ids."""
        if isinstance(self.tag, Hash):
            return hash_bucket(ids, self.tag.key, self.tag.buckets)
        return ids

    def buckets(self, ids: Tensor) -> Tensor:
        """The buckets of the ids."""
        return hash_bucket(ids, self.bucket.key, self.bucket.buckets)

    def pack(self, ids: Tensor) -> Tensor:
        """The store of keys with these distinct ids, each where its bucket has room, in order."""
        buckets = self.buckets(ids)
        order = torch.sort(buckets, stable=True).indices
        first = torch.searchsorted(buckets[order], buckets[order])
        way = torch.arange(ids.numel(), device=ids.device) - first
        fits = way < self.ways
        keys = torch.full((self.hot,), absent_code(self.bits), device=ids.device)
        keys[(buckets[order] * self.ways + way)[fits]] = self.tags(ids[order][fits])
        return pack_codes(keys, self.bits)

    def write(self, packed: Tensor, slots: Tensor, ids: Tensor) -> None:
        """Give distinct slots, numbered over all buckets, to other ids, in place."""
        write_codes(packed, slots, self.tags(ids), self.bits)

    def empty(self) -> Tensor:
        """The store of keys without any."""
        return self.pack(torch.empty(0, dtype=torch.int64))


def frequent_ids(table: TableSpec, count: int, padding_idx: int | None = None) -> Tensor:
    """At most ``count`` of the ids that occur, the most frequent first, ties by id."""
    assert table.counts is not None
    counts = table.counts.cpu()
    if padding_idx is not None:
        counts = counts.index_fill(0, torch.tensor(padding_idx), 0)
    ids = strongest(counts, min(count, table.num_embeddings))
    return ids[counts[ids] > 0]


def drawn_ids(table: TableSpec, count: int) -> Tensor:
    """About ``count`` ids, drawn by a keyed hash; no other id is looked at."""
    if count >= table.num_embeddings:
        return torch.arange(table.num_embeddings)
    return hash_bucket(torch.arange(count), table.key(_DRAWN), table.num_embeddings).unique()


def static_keys(table: TableSpec, layout: SlotLayout, padding_idx: int | None) -> Tensor:
    """Keys of the most frequent ids, or without counts of some that a hash draws.

    Twice as many ids as slots are offered, so that hardly a slot stays empty.
    """
    count = 2 * layout.hot
    if table.counts is None:
        return layout.pack(drawn_ids(table, count))
    return layout.pack(frequent_ids(table, count, padding_idx))


def check_split(hot: float, ways: int) -> None:
    """Raise ValueError unless the settings of a layout make sense."""
    if isinstance(hot, bool) or not 0 < hot < 1:
        raise ValueError(f"hot must be a share of the rows in (0, 1), got {hot!r}")
    if not isinstance(ways, int) or isinstance(ways, bool) or ways < 1:
        raise ValueError(f"ways must be an integer of at least 1, got {ways!r}")


def read_rows(plan: LookupPlan, stores: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The rows that ids read through the first probe."""
    return address_rows(plan.probes[0].address, ids, plan, stores)[0]
