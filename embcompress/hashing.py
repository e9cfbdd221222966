"""The keyed hash of the library, specified to the bit in ``docs/hashing.md``.

Plain Python integers here; :mod:`embcompress.engine.hashing` has the tensor form and
``csrc/plan.h`` the C++/CUDA form. All three agree on the golden values in the tests.
"""

from __future__ import annotations

import hashlib

MASK64 = (1 << 64) - 1

#: Multipliers and shifts of the 64-bit finalizer "variant 13" of D. Stafford, as used by
#: SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
MIX_SHIFTS = (30, 27, 31)
MIX_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix64(value: int) -> int:
    """Bijectively mix an unsigned 64-bit integer."""
    value &= MASK64
    value ^= value >> MIX_SHIFTS[0]
    value = (value * MIX_MULTIPLIERS[0]) & MASK64
    value ^= value >> MIX_SHIFTS[1]
    value = (value * MIX_MULTIPLIERS[1]) & MASK64
    return value ^ (value >> MIX_SHIFTS[2])


def hash_bucket(id: int, key: int, buckets: int) -> int:
    """Bucket of ``id`` in ``[0, buckets)``: the high 64 bits of ``mix64(id ^ key) * buckets``."""
    return (mix64((id ^ key) & MASK64) * buckets) >> 64


def hash_sign(id: int, key: int) -> int:
    """-1 or +1, from the top bit of ``mix64(id ^ key)`` (1 gives -1)."""
    return -1 if mix64((id ^ key) & MASK64) >> 63 else 1


#: Multipliers of the 8-byte tail and of the finalizer of MurmurHash3_x64_128 (A. Appleby, 2011,
#: public domain).
MURMUR_MULTIPLIERS = (0x87C37B91114253D5, 0x4CF5AD432745937F)
MURMUR_FINALIZER = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)


def _finalize_murmur(value: int) -> int:
    for multiplier in MURMUR_FINALIZER:
        value = ((value ^ (value >> 33)) * multiplier) & MASK64
    return value ^ (value >> 33)


def murmur_words(id: int, seed: int) -> tuple[int, int, int, int]:
    """The four 32-bit words of MurmurHash3_x64_128 of the id's 8 little-endian bytes.

    Args:
        id: 64 bits.
        seed: unsigned 32-bit.
    """
    mixed = (id * MURMUR_MULTIPLIERS[0]) & MASK64
    mixed = ((mixed << 31) | (mixed >> 33)) & MASK64
    mixed = (mixed * MURMUR_MULTIPLIERS[1]) & MASK64
    length = 8
    first = ((seed ^ mixed ^ length) + (seed ^ length)) & MASK64
    second = (first + (seed ^ length)) & MASK64
    first, second = _finalize_murmur(first), _finalize_murmur(second)
    first = (first + second) & MASK64
    second = (first + second) & MASK64
    low = (1 << 32) - 1
    return first & low, first >> 32, second & low, second >> 32


def derive_key(seed: int, name: str, probe: int) -> int:
    """64-bit key of one probe of one named table.

    Keys depend on the table's *name* and never on its position, so that reordering or adding
    tables changes nobody's addresses.

    Args:
        seed: any integer in ``[-2**63, 2**63)``.
        name: the table's name; may be empty.
        probe: number of the probe, in ``[0, 2**32)``.

    Returns:
        The first 8 bytes, little-endian, of BLAKE2b-64 over seed (8 bytes, two's complement,
        little-endian), probe (4 bytes, little-endian) and the UTF-8 name.

    Raises:
        ValueError: a seed or probe outside its range.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in a signed 64-bit integer, got {seed}")
    if not 0 <= probe < 2**32:
        raise ValueError(f"probe must be in [0, 2**32), got {probe}")
    message = (seed & MASK64).to_bytes(8, "little") + probe.to_bytes(4, "little") + name.encode()
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
