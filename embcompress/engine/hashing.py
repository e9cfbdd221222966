"""Hashes of ids in tensors, as ``docs/hashing.md`` has them to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from embcompress.hashing import (
    MASK64,
    MIX_MULTIPLIERS,
    MIX_SHIFTS,
    MURMUR_FINALIZER,
    MURMUR_MULTIPLIERS,
)
from embcompress.plan import HashFeatures

# torch has no unsigned 64-bit arithmetic: int64 multiplication wraps, and a logical shift is an
# arithmetic one with the copied sign bits masked off.

_LOW32 = (1 << 32) - 1


def signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value


def shift_right(value: Tensor, count: int) -> Tensor:
    return (value >> count) & ((1 << (64 - count)) - 1)


def mix64(value: Tensor) -> Tensor:
    """Elementwise :func:`embcompress.hashing.mix64` on the bits of an int64 tensor."""
    value = value ^ shift_right(value, MIX_SHIFTS[0])
    value = value * signed(MIX_MULTIPLIERS[0])
    value = value ^ shift_right(value, MIX_SHIFTS[1])
    value = value * signed(MIX_MULTIPLIERS[1])
    return value ^ shift_right(value, MIX_SHIFTS[2])


def multiply_high(value: Tensor, factor: int) -> Tensor:
    """High 64 bits of the unsigned product of each 64-bit value with ``factor`` < 2**63."""
    high, low = shift_right(value, 32), value & _LOW32
    factor_high, factor_low = factor >> 32, factor & _LOW32
    cross_a, cross_b = high * factor_low, low * factor_high
    carry = (cross_a & _LOW32) + (cross_b & _LOW32) + shift_right(low * factor_low, 32)
    return (
        high * factor_high
        + shift_right(cross_a, 32)
        + shift_right(cross_b, 32)
        + shift_right(carry, 32)
    )


def hash_bucket(ids: Tensor, key: int, buckets: int) -> Tensor:
    """Elementwise :func:`embcompress.hashing.hash_bucket`; int64 ids of any value."""
    return multiply_high(mix64(ids ^ signed(key)), buckets)


def hash_features(features: HashFeatures, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, count) numbers in [-1, 1] of (N,) ids."""
    counts = torch.arange(features.count, device=ids.device)
    keys = mix64(counts + signed(features.key))
    buckets = multiply_high(mix64(ids.long()[:, None] ^ keys), features.buckets)
    return buckets.to(dtype) * (2 / (features.buckets - 1)) - 1


def _finalize_murmur(value: Tensor) -> Tensor:
    for multiplier in MURMUR_FINALIZER:
        value = (value ^ shift_right(value, 33)) * signed(multiplier)
    return value ^ shift_right(value, 33)


def murmur_words(ids: Tensor, seed: int) -> list[Tensor]:
    """Elementwise :func:`embcompress.hashing.murmur_words`; int64 ids of any value."""
    mixed = ids * signed(MURMUR_MULTIPLIERS[0])
    mixed = (mixed << 31) | shift_right(mixed, 33)
    mixed = mixed * signed(MURMUR_MULTIPLIERS[1])
    first = (mixed ^ seed ^ 8) + (seed ^ 8)
    second = first + (seed ^ 8)
    first, second = _finalize_murmur(first), _finalize_murmur(second)
    first = first + second
    second = first + second
    return [first & _LOW32, shift_right(first, 32), second & _LOW32, shift_right(second, 32)]
