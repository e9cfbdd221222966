"""Rows of their own for the frequent ids, shared ones for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embcompress.layouts.hot_rows import HotRows
from embcompress.layouts.slots import KEYS, SlotLayout, static_keys
from embcompress.methods import register
from embcompress.methods.base import TableSpec
from embcompress.plan import LookupPlan


@register
@dataclass(frozen=True)
class Adaptive(HotRows):
    """Hot and cold rows: frequent ids own a row, E[slot(x)], the others share, E[h(x)].

    Which ids own rows is settled at the start: the most frequent ones by the counts of the table;
    without counts some that a hash draws, which is no better than hashing alone. See ``cafe`` and
    ``adaembed`` for what finds them in training. The ids with rows are found in a hash table of
    their keys with ``ways`` slots a bucket, so memory does not grow with the number of ids.

    Memory: m·d numbers for m rows, and ⌈log2(n + 1)⌉ bits for every row that is owned (32 where ids
    have more bits: then about one id in 2**32 / ``ways`` is taken for another).

    Source: "AdaptEmb" of Zhang et al., "Experimental analysis of large-scale learnable vector
    storage compression", PVLDB 17, 2023, after DeepRec. What differs: keys in slots, not an entry
    for every id.

    Attributes:
        hot: share of the rows that ids own, in (0, 1).
        ways: slots of a bucket, ≥ 1. An id whose bucket is full shares a row.
    """

    name: ClassVar[str] = "adaptive"

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        if stores[KEYS].device.type != "meta":
            keys = static_keys(table, SlotLayout.of(plan), plan.padding_idx)
            stores[KEYS].copy_(keys)
