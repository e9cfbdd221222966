"""Learned thresholds under which numbers of a store are pruned: plans, decay, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from embcompress.layouts.sparse import mask_bytes, mask_of_largest
from embcompress.plan import LookupPlan, Store
from embcompress.procedures.base import TableProcedure, TrainedTable

#: What a threshold is for.
Granularity = Literal["table", "column", "row", "element"]
GRANULARITIES = ("table", "column", "row", "element")


def threshold_name(store: str) -> str:
    """Name of the store of a store's thresholds."""
    return f"{store}_threshold"


def search_plan(built: LookupPlan, granularity: Granularity) -> LookupPlan:
    """The plan in which sparse stores are dense ones that are read through thresholds."""
    parts = {s.sparsity for s in built.stores if s.sparsity is not None}
    hidden = {part.index for part in parts} | {part.starts for part in parts}
    stores: list[Store] = []
    for store in built.stores:
        if store.name in hidden:
            continue
        if store.sparsity is None:
            stores.append(store)
            continue
        name = threshold_name(store.name)
        rows = store.rows if granularity in ("row", "element") else 1
        width = store.width if granularity in ("column", "element") else 1
        stores.append(replace(store, sparsity=None, threshold=name))
        stores.append(Store(name, rows, width, store.dtype))
    return replace(built, stores=tuple(stores)).with_pool("none", built.padding_idx)


def set_first_thresholds(plan: LookupPlan, stores: Mapping[str, Tensor], share: float) -> None:
    """Set thresholds, in place, to a share of the deviation of their numbers."""
    for store in plan.stores:
        if store.threshold is not None:
            first = min(share * float(stores[store.name].double().std(correction=0)), 0.5)
            stores[store.threshold].fill_(math.log(max(first, 1e-12) / (1 - first)))


def margins(values: Tensor, threshold: Tensor) -> Tensor:
    """By how much the numbers' magnitudes are above their thresholds."""
    return values.detach().abs() - threshold.detach().sigmoid()


class ThresholdSearch(TableProcedure):
    """Lets thresholds rise until as many numbers of each store are left as are to be kept.

    After every step thresholds are drawn towards 0, whose sigmoid is a half, as weight decay does.
    The mask of a store is taken when its plan's number is reached for the first time; a mask that
    was not reached is taken by the margins that there are in the end.

    Args:
        decay: share by which thresholds shrink in a step.
        interval: steps from one count of what is left to the next.
    """

    def __init__(self, decay: float, interval: int) -> None:
        self._decay, self._interval = decay, interval

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        tensors = {}
        for name in kept_numbers(table.built):
            device, size = table.stores()[name].device, mask_bytes(table.plan.store(name))
            tensors[f"{name}_mask"] = torch.zeros(size, dtype=torch.uint8, device=device)
            tensors[f"{name}_reached"] = torch.zeros(1, dtype=torch.bool, device=device)
        return tensors

    def is_due(self, number: int) -> bool:
        return True

    def step(self, table: TrainedTable, number: int) -> None:
        for name, kept in kept_numbers(table.built).items():
            if bool(table.tensor(f"{name}_reached")):
                continue
            threshold = table.stores()[threshold_name(name)]
            threshold.mul_(1 - self._decay)
            if number % self._interval == 0:
                self._count(table, name, kept, threshold)

    def _count(self, table: TrainedTable, name: str, kept: int, threshold: Tensor) -> None:
        above = margins(table.stores()[name], threshold)
        if int((above > 0).sum()) <= kept:
            table.tensor(f"{name}_mask").copy_(mask_of_largest(above, kept))
            table.tensor(f"{name}_reached").fill_(True)


def kept_numbers(built: LookupPlan) -> dict[str, int]:
    """How many numbers each sparse store of a plan keeps."""
    return {s.name: s.sparsity.stored for s in built.stores if s.sparsity is not None}


def found_mask(table: TrainedTable, name: str) -> Tensor:
    """The mask that a search has found for a store, also where it did not reach it."""
    if bool(table.tensor(f"{name}_reached")):
        return table.tensor(f"{name}_mask").clone()
    above = margins(table.stores()[name], table.stores()[threshold_name(name)])
    return mask_of_largest(above, kept_numbers(table.built)[name])


def check_search(epochs: int, decay: float, start: float, interval: int) -> None:
    """Check the settings of a search.

    Raises:
        ValueError: one that makes no sense.
    """
    if epochs < 1 or interval < 1 or not 0 <= decay < 1 or not start > 0:
        raise ValueError(
            "epochs and interval must be at least 1, decay in [0, 1) and start positive, got "
            f"{epochs}, {interval}, {decay}, {start}"
        )
