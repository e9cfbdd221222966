"""How much each id matters: a decaying sum of what was observed of it."""

from __future__ import annotations

import torch
from torch import Tensor


def _extremes(values: Tensor, count: int, largest: bool) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    threshold = torch.topk(values, count, largest=largest).values[-1]
    beyond = (values > threshold if largest else values < threshold).nonzero().flatten()
    equal = (values == threshold).nonzero().flatten()[: count - beyond.numel()]
    order = torch.sort(values[beyond], descending=largest, stable=True).indices
    return torch.cat([beyond[order], equal])


def strongest(values: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` largest values, largest first, ties by position.

    :func:`torch.topk` leaves the order of ties open; here equal input gives equal output.

    Args:
        values: (N,) without NaN.
        count: in [0, N].

    Returns:
        (count,) int64.
    """
    return _extremes(values, count, largest=True)


def weakest(values: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` smallest values, smallest first, ties by position."""
    return _extremes(values, count, largest=False)


def observe(importance: Tensor, ids: Tensor, amounts: Tensor) -> None:
    """Add what was seen of some ids, in place.

    Args:
        importance: (num_embeddings,) float.
        ids: (N,) int32 or int64; several occurrences of an id add up.
        amounts: (N,) not negative. What is not finite counts as nothing: a step whose gradients
            overflowed says nothing about the ids in it.
    """
    finite = torch.nan_to_num(amounts.to(importance.dtype), nan=0.0, posinf=0.0)
    importance.index_add_(0, ids.long(), finite)


def sum_by_id(ids: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids, rising, and the sums of their amounts; what is not finite counts as nothing.

    Args:
        ids: (N,) int32 or int64.
        amounts: (N,) float.

    Returns:
        (U,) int64 and (U,) float32.
    """
    distinct, inverse = torch.unique(ids.long(), return_inverse=True)
    finite = torch.nan_to_num(amounts.float(), nan=0.0, posinf=0.0, neginf=0.0)
    sums = torch.zeros(distinct.numel(), device=ids.device).index_add_(0, inverse, finite)
    return distinct, sums


def observe_half(importance: Tensor, ids: Tensor, amounts: Tensor) -> None:
    """As :func:`observe`, for float16: batch by batch in float32, and never beyond its range.

    A batch's amount below 2**-11 of what an id has is lost; decay keeps ids from getting there.
    """
    distinct, sums = sum_by_id(ids, amounts)
    total = importance[distinct].float() + sums
    importance[distinct] = total.clamp(max=torch.finfo(importance.dtype).max).to(importance.dtype)
