"""Heads of a plan: what maps the combined rows of an id, or of a bag, to its vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from embcompress.hashing import MASK64
from embcompress.plan.errors import require


@dataclass(frozen=True)
class Linear:
    """A linear head without bias; its weight is a store of ``embedding_dim`` rows."""

    kind: ClassVar[str] = "linear"
    weight: str

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of its weights."""
        return (self.weight,)


@dataclass(frozen=True)
class TensorTrain:
    """A product of the matrices, the *cores*, that lie side by side in the combined vector.

    Core k has ``ranks[k-1] * widths[k] * ranks[k]`` numbers, in this order, with a rank of 1 at
    either end. Number ``j`` of the vector, whose digits in the radices ``widths`` are ``j_1`` (the
    highest) to ``j_m``, is the product ``core_1[:, j_1, :] · … · core_m[:, j_m, :]``.

    Attributes:
        widths: digits of the columns; their product is ``embedding_dim``.
        ranks: between each core and the next.
    """

    kind: ClassVar[str] = "tensor_train"
    widths: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        require(
            len(self.widths) == len(self.ranks) + 1
            and all(number >= 1 for number in (*self.widths, *self.ranks)),
            f"a tensor train has positive widths and a rank between two of them, not widths "
            f"{self.widths} and ranks {self.ranks}",
        )

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Rank before, width and rank after of every core."""
        ranks = (1, *self.ranks, 1)
        return tuple(zip(ranks, self.widths, ranks[1:], strict=False))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of every core."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of its weights: it has none."""
        return ()


@dataclass(frozen=True)
class HashFeatures:
    """Numbers in [-1, 1] made of the id alone, by many hashes.

    Number i is ``2·h_i(x) / (buckets - 1) - 1``, where h_i is the hash into ``[0, buckets)`` with
    key ``mix64(key + i)`` (docs/hashing.md).

    Attributes:
        key: unsigned 64-bit.
        count: how many numbers.
        buckets: of each hash, at least 2, at most 2**24: so float32 tells them apart.
    """

    key: int
    count: int
    buckets: int = 1_000_000

    def __post_init__(self) -> None:
        require(0 <= self.key <= MASK64, "hash features: the key must be unsigned 64-bit")
        require(
            self.count >= 1 and 2 <= self.buckets <= 2**24,
            "hash features: count must be at least 1, buckets in [2, 2**24]",
        )


@dataclass(frozen=True)
class Network:
    """A multilayer perceptron over the combined vector, or over hashes of the id.

    Layer l gives ``W_l·v + b_l``. Between layers the sums of a vector are normalized to mean 0 and
    variance 1 (layer normalization without weights of its own), and Mish is applied.

    Attributes:
        weights: names of stores of (outputs × inputs) numbers, the first layer's first.
        biases: names of stores of (1 × outputs) numbers.
        inputs: what it reads instead of gathered rows: the plan has no probes then.
    """

    kind: ClassVar[str] = "network"
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    inputs: HashFeatures | None = None

    def __post_init__(self) -> None:
        require(
            len(self.weights) == len(self.biases) >= 1,
            "a network has as many weights as biases, and at least one",
        )

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of its weights and biases."""
        return (*self.weights, *self.biases)


Head: TypeAlias = Linear | TensorTrain | Network
