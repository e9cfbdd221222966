"""Running a plan: one entry, :func:`lookup`, over the engines that can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embcompress.engine.bags import Bags, check_ids, check_offsets, make_bags
from embcompress.engine.reference import lookup_reference
from embcompress.plan import LookupPlan

__all__ = [
    "Bags",
    "GradientOptions",
    "check_ids",
    "check_offsets",
    "lookup",
    "lookup_features",
    "make_bags",
]


@dataclass(frozen=True)
class GradientOptions:
    """The arguments of torch's modules that change how a table is trained.

    All but ``sparse`` speak of the rows of the dense table, and make sense for it alone.
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False


def lookup(
    plan: LookupPlan,
    stores: Mapping[str, Tensor],
    bags: Bags,
    options: GradientOptions = GradientOptions(),
) -> Tensor:
    """Vectors (``plan.pool == "none"``) or pooled bags of ids.

    Args:
        plan: the plan.
        stores: tensors by store name; float stores (rows, width), packed ones (bytes,) uint8.
        bags: canonical input; its ids are checked here.
        options: only :attr:`GradientOptions.sparse` applies to plans that are not dense.

    Returns:
        (N, embedding_dim) or (B, embedding_dim).

    Raises:
        IndexError: an id outside ``[0, plan.num_embeddings)``.
    """
    check_ids(bags.ids, plan.num_embeddings)
    if plan.is_dense:
        return _lookup_dense(plan, stores[plan.stores[0].name], bags, options)
    return lookup_reference(plan, stores, bags, sparse=options.sparse)


def _lookup_dense(plan: LookupPlan, weight: Tensor, bags: Bags, options: GradientOptions) -> Tensor:
    """The uncompressed table is torch's own operator, bit for bit."""
    if plan.pool == "none":
        return F.embedding(
            bags.ids,
            weight,
            plan.padding_idx,
            options.max_norm,
            options.norm_type,
            options.scale_grad_by_freq,
            options.sparse,
        )
    return F.embedding_bag(
        bags.ids,
        weight,
        bags.offsets,
        options.max_norm,
        options.norm_type,
        options.scale_grad_by_freq,
        plan.pool,
        options.sparse,
        bags.weights,
        include_last_offset=True,
        padding_idx=plan.padding_idx,
    )


def lookup_features(
    plans: Sequence[LookupPlan],
    stores: Sequence[Mapping[str, Tensor]],
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None = None,
    options: GradientOptions = GradientOptions(),
) -> Tensor:
    """Pooled bags of many features in one call.

    Args:
        plans: a pooling plan for each of F features.
        stores: the tensors of each plan by store name.
        ids: (N,) feature-major: all bags of feature 0, then all of feature 1, …
        offsets: (F * B + 1,) checked offsets; bag b of feature f is number f * B + b.
        weights: (N,) per-sample weights for plans that sum, or None.
        options: as in :func:`lookup`.

    Returns:
        (B, sum of embedding_dim), the columns of each feature in order.
    """
    batch, remainder = divmod(offsets.numel() - 1, len(plans))
    if remainder:
        raise ValueError(
            f"offsets has {offsets.numel()} entries, which is not {len(plans)} features * B + 1"
        )
    columns = []
    for feature, (plan, tensors) in enumerate(zip(plans, stores, strict=True)):
        part = offsets[feature * batch : (feature + 1) * batch + 1]
        begin, end = int(part[0]), int(part[-1])
        part_weights = None if weights is None else weights[begin:end]
        bags = Bags(ids[begin:end], part - begin, part_weights)
        columns.append(lookup(plan, tensors, bags, options))
    return torch.cat(columns, dim=1)
