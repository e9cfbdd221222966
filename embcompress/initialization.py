"""Start values: the assembled vectors get the variance that a full table would have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embcompress.plan import LookupPlan, Store, Weight


def store_deviation(plan: LookupPlan, std: float) -> float:
    """Standard deviation of a probe's rows that gives the combined vector deviation ``std``.

    For independent rows of mean 0 the variances of T probes add up in a sum and multiply in a
    product; a linear head of w columns with entries of variance 1/w keeps the variance.
    """
    count = len(plan.probes)
    if plan.combine == "sum":
        return std / count**0.5
    return std ** (1 / count) if plan.combine == "mul" else std


@torch.no_grad()
def initialize_stores(plan: LookupPlan, stores: Mapping[str, Tensor], std: float = 1.0) -> None:
    """Fill the float stores from torch's global generator; packed stores stay as they are."""
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    learned_scales = {p.scale.store for p in plan.probes if isinstance(p.scale, Weight)}
    for store in plan.stores:
        if not store.is_float:
            continue
        if store.name in learned_scales:
            stores[store.name].fill_(1.0)
        else:
            stores[store.name].normal_(0.0, _deviation(plan, store, std))


def _deviation(plan: LookupPlan, store: Store, std: float) -> float:
    if plan.head is not None and store.name == plan.head.weight:
        return plan.width**-0.5
    return store_deviation(plan, std)
