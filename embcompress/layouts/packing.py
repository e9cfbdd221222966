"""Packed stores of codes: writing and reading numbers of 1 to 32 bits.

Eight numbers of ``bits`` bits fill exactly ``bits`` bytes, so a stream is handled in groups of
eight: whole streams in chunks of groups, single numbers by their group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embcompress.engine.rows import unpack_bits

_GROUP = 8
_CHUNK = 1 << 17  # numbers


def absent_code(bits: int) -> int:
    """The code that stands for "absent": all bits set."""
    return (1 << bits) - 1


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a stream of ``count`` numbers."""
    return -(-count * bits // 8)


def _pack_groups(groups: Tensor, bits: int) -> Tensor:
    """(G, 8) int64 numbers -> (G, bits) uint8."""
    packed = torch.empty(groups.shape[0], bits, dtype=torch.uint8, device=groups.device)
    for byte in range(bits):
        value = torch.zeros_like(groups[:, 0])
        # The numbers that have bits in this byte.
        for number in range(8 * byte // bits, (8 * byte + 7) // bits + 1):
            shift = number * bits - 8 * byte
            part = groups[:, number]
            value |= part << shift if shift >= 0 else part >> -shift
        packed[:, byte] = value & 255
    return packed


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack numbers into one stream, low bits first, without padding between them.

    Args:
        codes: (N,) integers in ``[0, 2**bits)``.
        bits: 1 to 32.

    Returns:
        (⌈N * bits / 8⌉,) uint8.
    """
    packed = torch.empty(packed_bytes(codes.numel(), bits), dtype=torch.uint8, device=codes.device)
    for start in range(0, codes.numel(), _CHUNK):
        chunk = codes[start : start + _CHUNK].long()
        groups = chunk.new_zeros(-(-chunk.numel() // _GROUP), _GROUP)
        groups.view(-1)[: chunk.numel()] = chunk
        target = packed[start * bits // 8 :][: packed_bytes(chunk.numel(), bits)]
        target.copy_(_pack_groups(groups, bits).view(-1)[: target.numel()])
    return packed


def unpack_codes(packed: Tensor, start: int, end: int, bits: int) -> Tensor:
    """Numbers ``start`` to ``end`` (exclusive) of a stream, int64."""
    codes = torch.empty(end - start, dtype=torch.int64, device=packed.device)
    for first in range(start, end, _CHUNK):
        last = min(first + _CHUNK, end)
        positions = torch.arange(first, last, device=packed.device)
        codes[first - start : last - start] = unpack_bits(packed, positions, bits)
    return codes


def write_codes(packed: Tensor, positions: Tensor, codes: Tensor, bits: int) -> None:
    """Overwrite single numbers of a stream in place.

    Args:
        packed: (bytes,) uint8.
        positions: (N,) int64, without duplicates.
        codes: (N,) int64 in ``[0, 2**bits)``.
    """
    numbers, group = torch.unique(positions // _GROUP, return_inverse=True)
    every = numbers[:, None] * _GROUP + torch.arange(_GROUP, device=packed.device)
    # Numbers past the stream read as anything, and are not written back.
    groups = unpack_bits(packed, every, bits)
    groups[group, positions % _GROUP] = codes
    at = numbers[:, None] * bits + torch.arange(bits, device=packed.device)
    inside = at < packed.numel()
    packed[at[inside]] = _pack_groups(groups, bits)[inside]
