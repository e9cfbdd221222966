"""The number of distinct ids of a stream, in 2**bits bytes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from embcompress.statistics.hashes import Words, top_bits


class HyperLogLog:
    """Flajolet et al. (AofA 2007) on 64-bit hashes; relative standard error 1.04 / sqrt(2**bits).

    The estimate is Ertl's, "New cardinality estimation algorithms for HyperLogLog sketches" (2017,
    algorithm 6): without bias at any cardinality, and without tables of corrections. Registers
    are maxima, so those of parts of a stream make, bit for bit, those of the whole.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.registers: NDArray[np.uint8] = np.zeros(1 << bits, np.uint8)

    @property
    def largest(self) -> int:
        """The largest value of a register."""
        return 64 - self.bits + 1

    def add(self, words: Words) -> None:
        """Note mixed words; repetitions change nothing."""
        # The rest of the word, with a bit below its end that stops the count of leading zeros.
        rest = (words << np.uint64(self.bits)) | np.uint64(1 << (self.bits - 1))
        # A float64 holds 53 bits exactly: leading zeros of the upper 32, or of the lower.
        upper = (rest >> np.uint64(32)).astype(np.float64)
        lower = (rest & np.uint64(0xFFFFFFFF)).astype(np.float64)
        length = np.where(upper > 0, np.frexp(upper)[1] + 32, np.frexp(lower)[1])
        places, ranks = top_bits(words, self.bits), (65 - length).astype(np.uint8)
        raised = np.flatnonzero(self.registers[places] < ranks)  # soon very few
        np.maximum.at(self.registers, places[raised], ranks[raised])

    def merge(self, other: HyperLogLog) -> None:
        """Take the union with another sketch of the same hash."""
        np.maximum(self.registers, other.registers, out=self.registers)

    def estimate(self) -> float:
        """The number of distinct words."""
        size, last = float(1 << self.bits), 64 - self.bits
        histogram = np.bincount(self.registers, minlength=last + 2).tolist()
        if histogram[0] == size:
            return 0.0
        z = size * _tau(1 - histogram[last + 1] / size)
        for value in range(last, 0, -1):
            z = 0.5 * (z + histogram[value])
        z += size * _sigma(histogram[0] / size)
        return size * size / (2 * math.log(2)) / z


def _sigma(x: float) -> float:
    """x + sum over k of x**(2**k) * 2**(k - 1), for x in [0, 1)."""
    y, total = 1.0, x
    while True:
        x *= x
        before, total = total, total + x * y
        y += y
        if total == before:
            return total


def _tau(x: float) -> float:
    """(1 - x - sum over k of (1 - x**(2**-k))**2 * 2**-k) / 3, for x in [0, 1]."""
    if x in (0.0, 1.0):
        return 0.0
    y, total = 1.0, 1 - x
    while True:
        x = math.sqrt(x)
        before, y = total, 0.5 * y
        total -= (1 - x) ** 2 * y
        if total == before:
            return total / 3
