"""The layout of a table in which ids have rows of different precision.

Every id may have a row of a few bits a number, its own by its number; some ids have a row of more
bits, too, which is found in slots. Nothing is stored that says which precision an id has: it is
that of the slots where the id is found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embcompress.layouts.packing import absent_code, pack_codes
from embcompress.plan import Digit, LookupPlan, Probe, Quantization, Slot, Store

#: Bits of a number that ids may have; 0: no row.
PRECISIONS = (0, 1, 2, 4, 8)
_WAYS, _MOST_TAG = 8, 2**32 - 1
_OFFERED = 2  # ids for every slot: hardly one then stays empty


def rows_name(bits: int) -> str:
    """Name of the store of rows of that precision."""
    return f"rows_{bits}"


def scale_name(bits: int) -> str:
    """Name of the store of their steps, one a column."""
    return f"scale_{bits}"


def keys_name(bits: int) -> str:
    """Name of the store of the slots in which they are found."""
    return f"keys_{bits}"


def quantized_rows(rows: int, width: int, bits: int, dtype: str) -> tuple[Store, Store]:
    """The stores of rows of that precision: steps and numbers."""
    name = scale_name(bits)
    # Steps of 8 bits are so small that optimizers would tear them, and fine enough as they start.
    quantization = Quantization(name, trained=bits < PRECISIONS[-1])
    return (
        Store(name, 1, width, dtype),
        Store(rows_name(bits), rows, width, f"uint{bits}", quantization),
    )


@dataclass(frozen=True)
class PrecisionLayout:
    """Where the rows of a table of mixed precision are.

    The slots of a bucket hold what is left of an id when it is divided by the number of buckets,
    whose remainder is its bucket: together they are the id, so slots are small, and no two ids are
    taken for each other.

    Attributes:
        num_embeddings, embedding_dim: of the table.
        base: bits of the rows that all ids have, 0 where they have none.
        buckets: for every precision above ``base`` whose rows have slots, in falling order, how
            many buckets these are.
    """

    num_embeddings: int
    embedding_dim: int
    base: int
    buckets: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, plan: LookupPlan) -> PrecisionLayout:
        """The layout of a plan that :meth:`plan` made."""
        base, buckets = 0, []
        for probe in plan.probes:
            bits = plan.store(probe.store).bits
            if isinstance(probe.address, Slot):
                buckets.append((bits, probe.address.bucket.size))
            else:
                base = bits
        return cls(plan.num_embeddings, plan.embedding_dim, base, tuple(buckets))

    @property
    def ways(self) -> int:
        """Slots of a bucket."""
        return ways_of(self.num_embeddings)

    @property
    def slots(self) -> int:
        """Slots of all precisions."""
        return self.ways * sum(count for _, count in self.buckets)

    def plan(self, dtype: str) -> LookupPlan:
        """The plan, without pooling, with steps in this dtype."""
        n, d = self.num_embeddings, self.embedding_dim
        stores: list[Store] = []
        probes = []
        for bits, count in self.buckets:
            keys, slot = slots(keys_name(bits), n, count)
            stores += [keys, *quantized_rows(slot.size, d, bits, dtype)]
            probes.append(Probe(rows_name(bits), slot))
        if self.base:
            stores += quantized_rows(n, d, self.base, dtype)
            probes.append(Probe(rows_name(self.base), Digit(1, n)))
        return LookupPlan(n, d, tuple(stores), tuple(probes))

    def keys(self, ids: Tensor) -> dict[str, Tensor]:
        """Packed slots that give ids their rows, by the name of the store.

        Args:
            ids: distinct, the most important first. They get the highest precision until its slots
                are full, then the next. Where the bucket of an id is full, it goes down to the
                next, and a later id has its place. See :meth:`offered`.
        """
        keys = {}
        for bits, count in self.buckets:
            keys[keys_name(bits)], placed = fill_slots(self.num_embeddings, count, ids)
            left = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
            left[placed] = False
            ids = ids[left]
        return keys

    @property
    def offered(self) -> int:
        """How many ids :meth:`keys` looks at, at most: hardly a slot then stays empty."""
        buckets = sum(count for _, count in self.buckets)
        return offered_ids(self.num_embeddings, buckets)


def ways_of(num_embeddings: int) -> int:
    """Slots of a bucket; fewer for a few ids, so that budgets are used well."""
    return max(1, min(_WAYS, num_embeddings // 16))


def tag_bits(num_embeddings: int, buckets: int) -> int:
    """Bits of a slot, which holds an id divided by the number of buckets, or nothing."""
    return (-(-num_embeddings // buckets)).bit_length()


def slots(name: str, num_embeddings: int, buckets: int) -> tuple[Store, Slot]:
    """A store of keys of that name, and the address of the rows of the ids that it holds."""
    ways = ways_of(num_embeddings)
    tag = Digit(buckets, -(-num_embeddings // buckets))
    keys = Store(name, buckets, ways, f"uint{tag_bits(num_embeddings, buckets)}")
    return keys, Slot(name, buckets * ways, Digit(1, buckets), tag)


def offered_ids(num_embeddings: int, buckets: int) -> int:
    """How many ids are looked at to fill so many buckets, at most."""
    return min(_OFFERED * buckets * ways_of(num_embeddings), num_embeddings)


def fill_slots(num_embeddings: int, buckets: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Packed keys, and the places of those ids that found a slot.

    Args:
        ids: distinct, the most important first; an id whose bucket is full has none.
    """
    ways = ways_of(num_embeddings)
    offered = ids[: offered_ids(num_embeddings, buckets)]
    bucket = offered % buckets
    order = bucket.sort(stable=True).indices
    in_order = bucket[order]
    way = torch.arange(len(order), device=ids.device)
    way -= torch.searchsorted(in_order, in_order)
    fits = way < ways
    bits = tag_bits(num_embeddings, buckets)
    tags = torch.full((buckets * ways,), absent_code(bits), device=ids.device)
    placed = order[fits]
    tags[(in_order * ways + way)[fits]] = offered[placed] // buckets
    return pack_codes(tags, bits), placed


def buckets_for(num_embeddings: int, ids: int) -> int:
    """The fewest buckets with slots for so many ids."""
    fewest = -(-num_embeddings // _MOST_TAG)
    return max(fewest, -(-ids // ways_of(num_embeddings)))


def bucket_ranges(num_embeddings: int) -> list[range]:
    """The numbers of buckets that there may be, in rising order, by the bits of their slots."""
    n = num_embeddings
    most = max(1, n // ways_of(n))
    fewest, ranges = -(-n // _MOST_TAG), []
    while fewest <= most:
        bits = tag_bits(n, fewest)
        end = -(-n // (2 ** (bits - 1) - 1)) if bits > 1 else most + 1
        ranges.append(range(fewest, min(end, most + 1)))
        fewest = end
    return ranges
