"""What the compiled operators run of plans, and the dtype of what they give."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from embcompress.engine.heads import is_linear
from embcompress.plan import LookupPlan


def kernel_plan(plan: LookupPlan) -> LookupPlan:
    """What kernels run of a plan that ends in torch: vectors of all ids, after a linear head."""
    if is_linear(plan.head):
        return plan.with_pool("none", plan.padding_idx)
    return replace(gathered_plan(plan), pool="none")


def gathered_plan(plan: LookupPlan) -> LookupPlan:
    """The plan without its head."""
    if plan.head is None:
        return plan
    gathered = {probe.store for probe in plan.probes}
    own = tuple(s for s in plan.stores if s.name in gathered or s.name not in plan.head_stores)
    return replace(plan, head=None, embedding_dim=plan.width, stores=own)


def promoted_dtype(plans: Sequence[LookupPlan]) -> torch.dtype:
    """What the values of all features promote to."""
    names = {
        (store if store.quantization is None else plan.store(store.quantization.scale)).dtype
        for plan in plans
        for store in map(plan.store, [p.store for p in plan.probes] or plan.head_stores)
    }
    dtypes = [getattr(torch, name) for name in sorted(names)]
    return functools.reduce(torch.promote_types, dtypes)
