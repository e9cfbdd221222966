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
