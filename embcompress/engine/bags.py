"""Inputs of a lookup in one canonical form, checked once.

``torch.nn.EmbeddingBag`` accepts 1-D ids with offsets, 2-D ids, and jagged nested tensors; every
engine of ours sees only :class:`Bags`. The checks are stricter than torch's: offsets that torch
silently truncates are refused, and so are ids outside the vocabulary on every backend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ID_DTYPES = (torch.int32, torch.int64)


@dataclass(slots=True)
class Bags:
    """Bags of ids; bag ``b`` is ``ids[offsets[b]:offsets[b + 1]]``.

    Attributes:
        ids: (N,) int32 or int64.
        offsets: (B + 1,) of the ids' dtype, from 0 to N, not decreasing; the last may be left
            out where ``ends_are_given`` is False.
        weights: (N,) float per-sample weights, or None.
        checked: whether the offsets are known to be right; an engine checks them otherwise.
    """

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None = None
    checked: bool = False
    ends_are_given: bool = True

    def complete(self) -> Bags:
        """The same bags with the end of the last one among the offsets."""
        if self.ends_are_given:
            return self
        offsets = torch.cat([self.offsets, self.offsets.new_full((1,), self.ids.numel())])
        return replace(self, offsets=offsets, ends_are_given=True)


def make_bags(
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    *,
    include_last_offset: bool,
    check: bool = True,
) -> Bags:
    """Canonical bags from the arguments of ``torch.nn.EmbeddingBag.forward``.

    Args:
        check: complete the offsets and check their values; False leaves that to the engine.

    Raises:
        TypeError: lists or arrays, ids or offsets that are not int32 or int64, weights that are no
            floats.
        ValueError: shapes or offsets that describe no bags.
    """
    check_tensor("input", input)
    if offsets is not None:
        check_tensor("offsets", offsets)
    if per_sample_weights is not None:
        check_tensor("per_sample_weights", per_sample_weights)
    if per_sample_weights is not None and not per_sample_weights.is_floating_point():
        raise TypeError(
            f"per_sample_weights must be floating-point, got {per_sample_weights.dtype}; "
            "call .float() on it"
        )
    if input.is_nested:
        return _from_nested(input, offsets, per_sample_weights)
    _check_integers("input", input)
    if per_sample_weights is not None and per_sample_weights.shape != input.shape:
        raise ValueError(
            f"per_sample_weights has shape {tuple(per_sample_weights.shape)}, "
            f"input has {tuple(input.shape)}; they must be equal"
        )
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError("offsets must be None when input is 2-D: every row is a bag")
        batch, length = input.shape
        ends = torch.arange(batch + 1, dtype=input.dtype, device=input.device) * length
        return Bags(input.reshape(-1), ends, _flat(per_sample_weights), checked=True)
    if input.dim() != 1:
        raise ValueError(f"input must be 1-D (with offsets) or 2-D, got {input.dim()}-D")
    if offsets is None:
        raise ValueError("offsets must be given when input is 1-D")
    _check_integers("offsets", offsets)
    if offsets.dim() != 1:
        raise ValueError(f"offsets must be 1-D, got {offsets.dim()}-D")
    if input.dtype != offsets.dtype:
        # Like torch, int32 ids with int64 offsets (or the reverse) are promoted together.
        input, offsets = input.long(), offsets.long()
    if include_last_offset and offsets.numel() == 0:
        raise ValueError("offsets must have at least one entry with include_last_offset=True")
    bags = Bags(input, offsets, per_sample_weights, ends_are_given=include_last_offset)
    if not check:
        return bags
    bags = bags.complete()
    check_offsets(bags.offsets, input.numel())
    return replace(bags, checked=True)


def _flat(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.reshape(-1)


def _from_nested(input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> Bags:
    if offsets is not None:
        raise ValueError("offsets must be None when input is a nested tensor")
    if input.layout != torch.jagged or input.dim() != 2:
        raise ValueError("a nested input must be 2-D with layout=torch.jagged")
    ids = input.values()
    _check_integers("input", ids)
    if per_sample_weights is not None:
        nested = per_sample_weights.is_nested
        per_sample_weights = per_sample_weights.values() if nested else per_sample_weights
        if per_sample_weights.shape != ids.shape:
            raise ValueError("per_sample_weights must have as many values as the nested input")
    offsets = input.offsets()  # type: ignore[attr-defined]
    return Bags(ids, offsets.to(ids.dtype), per_sample_weights)


def check_tensor(name: str, value: object) -> None:
    """Refuse lists and arrays.

    Raises:
        TypeError: naming the argument.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(value).__name__}; call torch.as_tensor on it"
        )


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in ID_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}; call .long() on it")


def check_offsets(offsets: Tensor, num_ids: int) -> None:
    """Refuse offsets that do not start at 0, decrease, or do not end at ``num_ids``.

    Raises:
        ValueError: naming what is wrong (in a compiled graph: RuntimeError).
    """
    valid = (offsets[0] == 0) & (offsets[-1] == num_ids) & (offsets[1:] >= offsets[:-1]).all()
    if torch.compiler.is_compiling():
        torch._assert_async(valid, "offsets must rise from 0 to the number of ids")
    elif offsets.device.type != "meta" and not bool(valid):
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0:
            raise ValueError(f"offsets[0] must be 0, got {first}")
        if bool((offsets[1:] < offsets[:-1]).any()):
            position = int((offsets[1:] < offsets[:-1]).nonzero()[0]) + 1
            raise ValueError(
                f"offsets must not decrease: offsets[{position}] = {int(offsets[position])} "
                f"after {int(offsets[position - 1])} (there are {num_ids} ids)"
            )
        raise ValueError(f"the last offset must be the number of ids, {num_ids}, got {last}")


def check_ids(ids: Tensor, num_embeddings: int) -> None:
    """Refuse ids outside ``[0, num_embeddings)``.

    Raises:
        TypeError: ids that are not int32 or int64.
        IndexError: naming the first bad id and its position (in a compiled graph: RuntimeError).
    """
    _check_integers("input", ids)
    if ids.device.type == "meta":
        return
    if torch.compiler.is_compiling():  # before numel(), which a graph may not know
        valid = ((ids >= 0) & (ids < num_embeddings)).all()
        torch._assert_async(valid, f"ids must be in [0, {num_embeddings})")
        return
    if ids.numel() == 0:
        return
    low, high = ids.aminmax()
    if int(low) < 0 or int(high) >= num_embeddings:
        flat = ids.reshape(-1)
        position = int(((flat < 0) | (flat >= num_embeddings)).nonzero()[0])
        raise IndexError(
            f"id {int(flat[position])} at position {position} is outside "
            f"[0, {num_embeddings}); map unknown ids to a reserved id first"
        )
