"""Tensor-train layouts of a table: digits of ids and columns, ranks, and the cores of a table."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from embcompress.layouts.factors import root_ceiling
from embcompress.plan import Digit, LookupPlan, Probe, Store, TensorTrain


def balanced_digits(num_embeddings: int, cores: int) -> tuple[int, ...]:
    """Radices of about equal size whose product is at least ``num_embeddings``, highest first."""
    radices: list[int] = []
    rest = num_embeddings
    for left in range(cores, 0, -1):
        radices.append(root_ceiling(rest, left))
        rest = -(-rest // radices[-1])
    return tuple(reversed(radices))


@dataclass(frozen=True)
class TrainLayout:
    """The shape of a tensor train.

    Attributes:
        radices: digits of the ids, highest first.
        widths: digits of the columns.
    """

    radices: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def most_ranks(self) -> tuple[int, ...]:
        """Ranks with which a train represents every table."""
        sides = [r * w for r, w in zip(self.radices, self.widths, strict=True)]
        return tuple(min(math.prod(sides[:k]), math.prod(sides[k:])) for k in range(1, len(sides)))

    def steps(self, numbers: int) -> range:
        """The steps of :meth:`ranks` that take at most so many numbers, and the first of all."""
        most = self.most_ranks
        every = range(1, 1 + max(len(most) * (rank - 2) + k + 2 for k, rank in enumerate(most)))
        return every[: max(1, bisect_right(every, numbers, key=self._numbers))]

    def _numbers(self, step: int) -> int:
        sizes = TensorTrain(self.widths, self.ranks(step)).sizes
        return sum(radix * size for radix, size in zip(self.radices, sizes, strict=True))

    def ranks(self, step: int) -> tuple[int, ...]:
        """The ranks at a step from 1: all 1, then one of them larger by 1, in turn."""
        most = self.most_ranks
        return tuple(
            min(most[k], 1 + (step - 1 + len(most) - 1 - k) // len(most)) for k in range(len(most))
        )

    def plan(self, num_embeddings: int, ranks: tuple[int, ...], dtype: str) -> LookupPlan:
        """The lookup with these ranks."""
        head = TensorTrain(self.widths, ranks)
        stores, probes, divisor = [], [], math.prod(self.radices)
        for k, (radix, size) in enumerate(zip(self.radices, head.sizes, strict=True)):
            divisor //= radix
            stores.append(Store(f"core_{k}", radix, size, dtype))
            probes.append(Probe(f"core_{k}", Digit(divisor, radix)))
        return LookupPlan(
            num_embeddings,
            math.prod(self.widths),
            stores=tuple(stores),
            probes=tuple(probes),
            combine="concat",
            head=head,
        )

    def decompose(self, weight: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
        """Cores whose train is near a table: TT-SVD (Oseledets, 2011, algorithm 1).

        The squared error is at most as many times the least one as there are ranks.

        Args:
            weight: (n, d) float; ids past the n-th, as far as the radices reach, count as zero.
            ranks: of the train.

        Returns:
            (radix, core's size) for each core, of one root mean square.
        """
        cores = len(self.radices)
        padded = weight.new_zeros(math.prod(self.radices), weight.shape[1], dtype=torch.float32)
        padded[: len(weight)] = weight
        digits = padded.view(*self.radices, *self.widths)
        pairs = [axis for k in range(cores) for axis in (k, cores + k)]
        rest = digits.permute(pairs).reshape(1, -1)
        parts = []
        for k, (rank, after) in enumerate(zip((1, *ranks), (*ranks, 1), strict=True)):
            side = self.radices[k] * self.widths[k]
            rest = rest.reshape(rank * side, -1)
            if k < cores - 1:
                basis = _leading_directions(rest, after)
                rest = basis.T @ rest
            else:
                basis = rest
            shape = (rank, self.radices[k], self.widths[k], after)
            parts.append(basis.reshape(shape).transpose(0, 1).reshape(self.radices[k], -1))
        return _of_one_scale(parts)


def _leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """(rows, rank) orthonormal: the left singular vectors of the largest singular values."""
    rows, columns = matrix.shape
    if rows <= columns:
        moments = matrix.double() @ matrix.double().T
        return torch.linalg.eigh(moments).eigenvectors[:, -rank:].flip(1).to(matrix)
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]


def _of_one_scale(parts: list[Tensor]) -> list[Tensor]:
    """The parts times numbers whose product is 1, so that all have one root mean square."""
    sizes = [float(part.square().mean().sqrt()) for part in parts]
    if min(sizes) == 0:
        return parts
    common = math.prod(sizes) ** (1 / len(sizes))
    return [part * (common / size) for part, size in zip(parts, sizes, strict=True)]
