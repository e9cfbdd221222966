"""Full tables: torch's own operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embcompress.engine.bags import Bags, check_ids, check_offsets
from embcompress.engine.reference import pool_bags
from embcompress.plan import LookupPlan


@dataclass(frozen=True)
class GradientOptions:
    """The arguments of torch's modules that change how a table is trained.

    All but ``sparse`` speak of the rows of the dense table, and make sense for it alone.
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False


def lookup_dense(plan: LookupPlan, weight: Tensor, bags: Bags, options: GradientOptions) -> Tensor:
    """What torch's own module gives, bit for bit.

    Args:
        plan: of a dense table.
        weight: (num_embeddings, embedding_dim), its store.
        bags: complete ones.
        options: all of them apply.

    Raises:
        IndexError: an id outside the vocabulary.
        ValueError: offsets that do not rise.
    """
    check_ids(bags.ids, plan.num_embeddings)
    if plan.pool != "none" and not bags.checked:
        check_offsets(bags.offsets, bags.ids.numel())
    # Torch has no gradient of these maxima on a GPU.
    in_two_steps = plan.pool == "max" and weight.is_cuda and weight.dtype == torch.bfloat16
    if plan.pool == "none" or in_two_steps:
        vectors = F.embedding(
            bags.ids,
            weight,
            plan.padding_idx,
            options.max_norm,
            options.norm_type,
            options.scale_grad_by_freq,
            options.sparse,
        )
        return pool_bags(plan, vectors, bags) if in_two_steps else vectors
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
