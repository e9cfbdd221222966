"""Deep hash embeddings: a network computes vectors, and nothing is looked up."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import HashFeatures, LookupPlan, Network, Store

#: Normalized sums of fewer hidden numbers say little: of two, one sign.
_LEAST_WIDTH = 4


@register
@dataclass(frozen=True)
class DeepHash(Method):
    """Deep hash embedding, MLP(h₁(x), …, h_k(x)): a network computes vectors from hashes of the id.

    k hashes of the id into ``buckets``, as numbers in [-1, 1], go through ``layers`` hidden layers
    of w numbers and one linear layer to d. A hidden layer is Mish of its sums, which are normalized
    to mean 0 and variance 1 for each id (layer normalization without weights). A vector costs a
    pass through the network instead of a memory access; in a batch, it is computed once for each
    distinct id.

    Memory: w·k + (layers - 1)·w² + d·w weights and layers·w + d biases, whatever n is. The dial is
    w, from 4; k is ``hashes``, or w where that is less.

    Source: Kang et al., "Learning to embed categorical features without embedding tables for
    recommendation", KDD 2021, sections 3 and 4. What differs: hashes are of 64 bits and keyed by
    the table's name; features are even numbers (the paper finds normal ones no better);
    layer instead of batch normalization, so that a vector depends on its id alone; two hidden
    layers instead of five; and small networks take fewer hashes, since at k = 1024 the first layer
    would be nearly all of them.

    Attributes:
        hashes: k, at most.
        layers: hidden ones, at least 1.
        buckets: of each hash, 2 to 2**24.
    """

    name: ClassVar[str] = "dhe"
    hashes: int = 1024
    layers: int = 2
    buckets: int = 1_000_000

    def __post_init__(self) -> None:
        for field, least in (("hashes", 1), ("layers", 1), ("buckets", 2)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field} must be an integer of at least {least}, got {value!r}")
        if self.buckets > 2**24:
            raise ValueError(f"buckets must be at most 2**24, got {self.buckets}")

    def sizes(self, table: TableSpec) -> range:
        # A network of √(n·d) hidden numbers has more weights than the table has numbers.
        numbers = table.num_embeddings * table.embedding_dim
        return range(_LEAST_WIDTH, max(_LEAST_WIDTH, math.isqrt(numbers)) + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        inputs = HashFeatures(table.key(0), min(self.hashes, size), self.buckets)
        widths = [inputs.count, *[size] * self.layers, table.embedding_dim]
        weights = [
            Store(f"weight_{layer}", outputs, width, table.dtype)
            for layer, (width, outputs) in enumerate(itertools.pairwise(widths))
        ]
        biases = [
            Store(f"bias_{layer}", 1, outputs, table.dtype)
            for layer, outputs in enumerate(widths[1:])
        ]
        network = Network(
            tuple(store.name for store in weights), tuple(store.name for store in biases), inputs
        )
        return LookupPlan(
            table.num_embeddings,
            table.embedding_dim,
            stores=(*weights, *biases),
            probes=(),
            head=network,
        )

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Not possible: no weight of the network stands for some ids.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "method 'dhe' cannot start from a trained table; train it from the start, or choose "
            "another method"
        )
