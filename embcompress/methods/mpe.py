"""Rows of a precision that is searched for groups of ids."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import calibrate, check_finite
from embcompress.engine.rows import address_rows, gather_rows
from embcompress.layouts.kept_ids import choose_kept_ids
from embcompress.layouts.latents import pack_latents
from embcompress.layouts.precision import PrecisionLayout, bucket_ranges, scale_name
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.methods.full import Full
from embcompress.plan import LookupPlan, Slot, total_bytes
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.phases import Phase, PhasedTable, Score, TableForm
from embcompress.procedures.precision_search import (
    SENSITIVITY,
    SearchedTable,
    Segments,
    SensitivitySearch,
    by_count,
    choose_plans,
    group_sizes,
)

_SEARCH, _RETRAIN = "search", "retrain"
#: Bits of the rows of all ids, and of those of frequent ids: the layouts of the dial.
_STEPS = ((0, 4), (1, 4), (2, 4), (4, 8))
_MOST_BITS = 8


@register
@dataclass(frozen=True)
class MPE(Method):
    """Mixed precision, E₀[x] + E₁[slot(x)]: rows in 0 to 8 bits a number, more where it pays.

    The ids are put into groups by falling count: the last one has half of the ids, the one before
    it half of the others, and so on; without counts there is one group. In the first phase the
    full table is trained, and it is measured how much the loss minds errors in the rows of each
    group (:class:`embcompress.procedures.precision_search.SensitivitySearch`). Then one price of a
    bit is found for the groups of all tables at which their precisions, 0, 1, 2, 4 or 8 bits a
    number, meet the budget, and rows of these precisions are trained from start values. A table
    that would take no fewer bytes stays full.

    Rows of a precision are found in slots, which hold keys of the ids that have one: nothing is
    stored for ids of 0 bits. Where that is cheaper, all ids have a row of the lowest precision,
    which needs no slots, and those of higher precision add a row to it. An id that finds its slots
    full gets the next lower precision. Without phases the most frequent ids have rows of 4 bits,
    the others none; or of 4 and 1, 4 and 2, 8 and 4 bits.

    Memory: k·(d·b + t) / 8 bytes for k ids in b bits, with keys of about t = log2(8·n/k) bits;
    n·d·b / 8 bytes for rows of all ids; and 4·d bytes of steps for every precision. While it
    searches, a table is full, and has a byte more for every id.

    Source: Li et al., "Mixed-precision embeddings for large-scale recommendation models",
    arXiv 2409.20305, 2024: precisions searched for groups by frequency, then trained again. What
    differs: there every group learns a distribution over precisions, under a penalty for expected
    bits; here precisions follow from the groups' sensitivity, as the gradients of such weights
    were mostly noise for small groups, and the price of a bit from the budget. Groups are halves,
    not of one size. The memory of what tells precisions apart is counted.

    Attributes:
        groups: number of groups, at most; 1 to 64.
        epochs: passes of the search, ≥ 1.
    """

    name: ClassVar[str] = "mpe"
    searches_plans: ClassVar[bool] = True
    groups: int = 16
    epochs: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.groups <= 64 or self.epochs < 1:
            raise ValueError(
                "groups must be in [1, 64] and epochs at least 1, got "
                f"{self.groups} and {self.epochs}"
            )

    # -- the plan

    def sizes(self, table: TableSpec) -> range:
        """Buckets of slots of a step of the dial, then those of the next."""
        return range(sum(len(part.buckets) for part in self._parts(table)))

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        parts = self._parts(table)
        ends = list(accumulate(len(part.buckets) for part in parts))
        number = bisect_right(ends, size)
        part = parts[number]
        return part.layout(table, part.buckets[size - ends[number]]).plan(table.dtype)

    @staticmethod
    def _parts(table: TableSpec) -> tuple[_Part, ...]:
        return _parts(table.num_embeddings, table.embedding_dim, table.dtype)

    # -- which ids

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        keys = [s.name for s in plan.stores if not s.is_float and s.quantization is None]
        if keys and stores[keys[0]].device.type != "meta":
            packed = self._keys(table, plan, stores[keys[0]].device)
            for name in keys:
                stores[name].copy_(packed[name])

    @staticmethod
    def _keys(table: TableSpec, plan: LookupPlan, device: torch.device) -> dict[str, Tensor]:
        layout = PrecisionLayout.of(plan)
        return layout.keys(choose_kept_ids(table, layout.offered, plan.padding_idx, device))

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Post-training quantization; rows in slots are what the rows of all ids leave over.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        stores = self._keys(table, plan, weight.device)
        rest, ids = weight.detach().float(), torch.arange(len(weight), device=weight.device)
        counts = torch.ones(len(weight)) if table.counts is None else table.counts.float() + 0.1
        for probe in reversed(plan.probes):
            store = plan.store(probe.store)
            rows, present = address_rows(probe.address, ids, plan, stores)
            if present is None:
                own = ids
            else:
                own, rows = ids[present], rows[present]
            latents = rest.new_zeros(store.rows, store.width)
            latents[rows] = rest[own]
            scale, _ = calibrate(
                rest[own] if len(own) else latents,
                store.bits,
                "column",
                symmetric=True,
                importance=counts.to(rest)[own] if len(own) else None,
                dtype=getattr(torch, table.dtype),
            )
            stores[scale_name(store.bits)] = scale
            stores[store.name] = pack_latents(plan, store, {**stores, store.name: latents})
            if not isinstance(probe.address, Slot):
                rest = rest - gather_rows(plan, store, stores, ids, sparse=False).float()
        return stores

    # -- training

    def phases(self) -> tuple[Phase, Phase]:
        return Phase(_SEARCH, self.epochs), Phase(_RETRAIN, weights="initial")

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        return SensitivitySearch(self.groups) if phase.name == _SEARCH else None

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        if phase.name == _SEARCH:
            return [self._full(table) for table in tables]
        found = [
            SearchedTable(
                table.spec,
                group_sizes(table.spec, self.groups),
                table.tensor(SENSITIVITY).cpu(),
            )
            for table in tables
        ]
        plans = choose_plans(found, total_bytes(table.built for table in tables))
        return [self._final(table, *form) for table, form in zip(tables, plans, strict=True)]

    @staticmethod
    def _full(table: PhasedTable) -> TableForm:
        plan = Full().plan(table.spec, table.spec.num_embeddings)
        return TableForm(plan, table.new_stores(plan))

    @staticmethod
    def _final(table: PhasedTable, plan: LookupPlan, segments: Segments) -> TableForm:
        stores = table.new_stores(plan)
        if plan.is_dense:
            return TableForm(plan, stores)
        ids, bits = (torch.tensor(column) for column in zip(*segments, strict=True))
        order = by_count(table)
        # Of equal precision the more frequent ids come first.
        wanted = torch.repeat_interleave(bits, ids).to(order.device)
        order = order[wanted.sort(descending=True, stable=True).indices]
        for name, keys in PrecisionLayout.of(plan).keys(order).items():
            stores[name].copy_(keys)
        return TableForm(plan, stores)


# ---------------------------------------------------------------------------------- the dial


@dataclass(frozen=True)
class _Part:
    """A stretch of the dial, on which bytes rise with every bucket.

    Attributes:
        base: bits of the rows of all ids.
        bits: of the rows in slots.
        buckets: how many there may be; 0 for rows of all ids alone.
    """

    base: int
    bits: int
    buckets: range

    def layout(self, table: TableSpec, count: int) -> PrecisionLayout:
        buckets = ((self.bits, count),) if count else ()
        return PrecisionLayout(table.num_embeddings, table.embedding_dim, self.base, buckets)


@functools.lru_cache(maxsize=64)
def _parts(num_embeddings: int, embedding_dim: int, dtype: str) -> tuple[_Part, ...]:
    """The stretches of the dial, in rising order of bytes.

    More buckets have smaller keys, so the most buckets of a stretch may take more bytes than the
    fewest of the next; these have no place on the dial.
    """
    table = TableSpec(num_embeddings, embedding_dim, dtype=dtype)
    parts = [
        _Part(base, bits, buckets)
        for base, bits in _STEPS
        for buckets in (*([range(1)] if base else []), *bucket_ranges(num_embeddings))
    ]
    parts.append(_Part(_MOST_BITS, 0, range(1)))
    kept: list[_Part] = []
    limit = None
    for part in reversed(parts):

        def size_bytes(count: int, part: _Part = part) -> int:
            return part.layout(table, count).plan(dtype).bytes

        buckets = part.buckets
        if limit is not None:
            buckets = buckets[: bisect_right(buckets, limit, key=size_bytes)]
        if buckets:
            kept.append(_Part(part.base, part.bits, buckets))
            limit = size_bytes(buckets[0])
    return tuple(reversed(kept))
