"""Running plans: :class:`Program` picks the engine, :func:`lookup` and :func:`lookup_features`
are its plain forms.

Three engines give the same results: torch's own operator for a dense table (bit for bit torch's
module), the compiled operators (``ops.py``), and the reference (``reference.py``), which runs
everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from embcompress.engine.bags import Bags, check_ids, check_offsets, make_bags
from embcompress.engine.dense import GradientOptions
from embcompress.engine.program import Program, Stores
from embcompress.plan import LookupPlan

__all__ = [
    "Bags",
    "GradientOptions",
    "Program",
    "check_ids",
    "check_offsets",
    "lookup",
    "lookup_features",
    "make_bags",
]


def lookup(
    plan: LookupPlan,
    stores: Stores,
    bags: Bags,
    options: GradientOptions = GradientOptions(),
) -> Tensor:
    """Vectors (``plan.pool == "none"``) or pooled bags of ids; see :class:`Program`."""
    return Program((plan,), options)((stores,), bags)


def lookup_features(
    plans: Sequence[LookupPlan],
    stores: Sequence[Stores],
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None = None,
    options: GradientOptions = GradientOptions(),
) -> Tensor:
    """Pooled bags of many features in one call; see :class:`Program`.

    Args:
        plans: a pooling plan for each of F features.
        stores: the tensors of each plan by store name.
        ids: (N,) feature-major: all bags of feature 0, then all of feature 1, …
        offsets: (F * B + 1,); bag b of feature f is number f * B + b.
        weights: (N,) per-sample weights for plans that sum, or None.
        options: as in :class:`Program`.

    Returns:
        (B, sum of embedding_dim), the columns of each feature in order.
    """
    return Program(plans, options)(stores, Bags(ids, offsets, weights))
