"""The library's keyed hash (``docs/hashing.md``) on numpy arrays.

Buckets are always a power of two here, so that ``hash_bucket(id, key, 2**bits)`` is the top
``bits`` of the mixed word: a shift in place of a 128-bit product.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embcompress.hashing import MASK64, MIX_MULTIPLIERS, MIX_SHIFTS

Words = NDArray[np.uint64]

_SHIFTS = tuple(np.uint64(shift) for shift in MIX_SHIFTS)
_MULTIPLIERS = tuple(np.uint64(multiplier) for multiplier in MIX_MULTIPLIERS)


def mixed_words(ids: NDArray[np.int64], key: int) -> Words:
    """``mix64(id ^ key)`` of each id, as a new array."""
    words = ids.view(np.uint64) ^ np.uint64(key & MASK64)
    shifted = words >> _SHIFTS[0]  # the one temporary: fresh pages cost more than the arithmetic
    words ^= shifted
    for multiplier, shift in zip(_MULTIPLIERS, _SHIFTS[1:], strict=True):
        words *= multiplier
        words ^= np.right_shift(words, shift, out=shifted)
    return words


def top_bits(words: Words, bits: int) -> NDArray[np.int64]:
    """The bucket in ``[0, 2**bits)`` of each mixed word; 1 ≤ bits < 64."""
    return (words >> np.uint64(64 - bits)).view(np.int64)


def hash_buckets(ids: NDArray[np.int64], key: int, buckets: int) -> NDArray[np.int64]:
    """:func:`embcompress.hashing.hash_bucket` of each id; ``buckets`` a power of two, ≥ 2."""
    return top_bits(mixed_words(ids, key), buckets.bit_length() - 1)
