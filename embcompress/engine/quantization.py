"""Latent numbers read as their codes' values, and the gradients that train both.

A quantized store that is being trained holds float *latents*. A lookup sees what it will see once
they are packed: with the step ``s``, the bias ``b`` and ``bits`` bits ::

    code  = clamp(round((latent - b) / s), 0, 2**bits - 1)
    value = s * code + b

or, without a bias, ``latent / s + middle`` and ``s * (code - middle)`` with
``middle = (2**bits - 1) / 2``. Rounding is to the nearest, halves to the even code.

Gradients, with ``x`` for the position before rounding and clamping: a latent gets the value's
gradient where it is within half a step of its code, ``-1/2 <= x <= 2**bits - 1/2``, and nothing
outside (the straight-through estimator). The step gets ``code - x`` inside and ``code`` (or
``code - middle``) outside; the bias 0 inside and 1 outside. Both are damped by
:func:`gradient_scale`.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 1 to 5 and section
2.2; the bias: Bhalgat et al., "LSQ+", CVPR workshops 2020, equations 3 to 6. What differs: there
the outermost codes' range ends at the codes themselves, so that one bit is trained between its
two values alone. With half a step more, the range of every code is as wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embcompress.plan import Store


def gradient_scale(store: Store, scale: Store) -> float:
    """What multiplies the gradients of a store's step and bias: ``1 / sqrt(N * (2**bits - 1))``.

    N is how many numbers of the store share one step: the step then moves about as far as the
    latents do, in proportion to its size (Esser, section 2.2).
    """
    shared = (store.rows // scale.rows) * (store.width // scale.width)
    return (shared * (2**store.bits - 1)) ** -0.5


def code_positions(values: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """Where the values lie on the scale of the codes, before rounding, clamped to the codes.

    A step of zero has codes 0 and 2**bits - 1 alone: below and above the bias.
    """
    step = torch.where(scale == 0, torch.finfo(scale.dtype).tiny, scale)
    last = 2**bits - 1
    positions = values / step + last / 2 if bias is None else (values - bias) / step
    return _Clamp.apply(positions, last)


def dequantize(codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """Values of codes (of a float dtype)."""
    return scale * (codes - (2**bits - 1) / 2) if bias is None else scale * codes + bias


def fake_quantize(
    values: Tensor, scale: Tensor, bias: Tensor | None, bits: int, damping: float
) -> Tensor:
    """Values as they will be once packed, differentiable as the module says.

    Args:
        values: (N, width) latents.
        scale, bias: what broadcasts over them.
        bits: 1, 2, 4, 8 or 16.
        damping: of the gradients of scale and bias (:func:`gradient_scale`).
    """
    scale = _ScaledGradient.apply(scale, damping)
    bias = None if bias is None else _ScaledGradient.apply(bias, damping)
    codes = _RoundStraightThrough.apply(code_positions(values, scale, bias, bits))
    return dequantize(codes, scale, bias, bits)


class _Clamp(torch.autograd.Function):
    """Clamping to [0, last] that hands gradients on up to half a step beyond."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, last: int) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.last = last
        return positions.clamp(0, last)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        inside = (positions >= -0.5) & (positions <= ctx.last + 0.5)
        return gradients[0] * inside, None


class _RoundStraightThrough(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _ScaledGradient(torch.autograd.Function):
    """The identity; its gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
