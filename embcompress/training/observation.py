"""What can be seen of a table from outside: the ids of a call, and their gradients."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from embcompress.collection import EmbeddingBagCollection, FeatureInput, feature_bags
from embcompress.engine import Bags, make_bags
from embcompress.modules import EmbeddingBag
from embcompress.tables.compressed_table import CompressedTable


@dataclass(frozen=True)
class Observation:
    """One lookup of a table.

    It does not hold the output: a hook of the output holds it, and the two would keep each other
    alive.

    Attributes:
        table: the table.
        bags: what was looked up; without pooling its ids alone count.
        first_column: where the table's columns begin in the output (of a collection).
    """

    table: CompressedTable
    bags: Bags
    first_column: int = 0

    @property
    def ids(self) -> Tensor:
        """(N,) every occurrence of an id."""
        return self.bags.ids

    def occurrences(self) -> Tensor:
        """(N,) float32: 1 for every occurrence, 0 for the padding id."""
        padding_idx = self.table.padding_idx
        if padding_idx is None:
            return torch.ones(1, device=self.ids.device).expand(self.ids.numel())
        return (self.ids != padding_idx).float()

    def gradient_norms(self, gradient: Tensor) -> Tensor:
        """(N,) the norm of the gradient of every occurrence's vector.

        For sums and means it is the norm of the bag's gradient, times the occurrence's weight. For
        maxima it is the norm of the whole bag's gradient, an upper bound.

        Args:
            gradient: of the output.
        """
        norms = self._columns(gradient).norm(dim=1)
        bag, factors = self._shares(norms.numel())
        return (norms if bag is None else norms[bag]) * factors.abs()

    def gradients(self, gradient: Tensor) -> Tensor:
        """(N, embedding_dim) float32: the gradient of every occurrence's vector.

        Args:
            gradient: of the output.

        Raises:
            ValueError: the bags are pooled by maxima, each column of which has its own winner.
        """
        if self.table.plan.pool == "max":
            raise ValueError("the gradients of vectors are not known where bags are maxima")
        columns = self._columns(gradient)
        bag, factors = self._shares(columns.shape[0])
        return (columns if bag is None else columns[bag]) * factors[:, None]

    def _columns(self, gradient: Tensor) -> Tensor:
        """(bags, embedding_dim) float32: the table's columns of the output's gradient."""
        end = self.first_column + self.table.embedding_dim
        columns = gradient.reshape(-1, gradient.shape[-1])[:, self.first_column : end]
        return columns.float().contiguous()  # expanded ones are slow

    def _shares(self, rows: int) -> tuple[Tensor | None, Tensor]:
        """The row of the output that every occurrence adds to, and (N,) by what factor.

        None for the rows: they are the occurrences.
        """
        counted, pool = self.occurrences(), self.table.plan.pool
        if pool == "none":
            return None, counted
        lengths = self.bags.offsets[1:].long() - self.bags.offsets[:-1].long()
        bag = torch.repeat_interleave(torch.arange(rows, device=counted.device), lengths)
        factors = counted
        if pool == "mean":
            sizes = counted.new_zeros(rows).index_add_(0, bag, counted)
            factors = factors / sizes.clamp(min=1)[bag]
        return bag, factors if self.bags.weights is None else factors * self.bags.weights.float()


def observe_table(
    watched: Container[CompressedTable],
    module: CompressedTable,
    output: Tensor,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Iterator[Observation]:
    """The lookup of a call of ``Embedding`` or ``EmbeddingBag``, which is watched."""
    if isinstance(module, EmbeddingBag):
        last = module.include_last_offset
        bags = make_bags(input, offsets, per_sample_weights, include_last_offset=last)
    else:
        bags = Bags(input.reshape(-1), input.reshape(-1))
    yield Observation(module, _detached(bags))


def observe_collection(
    watched: Container[CompressedTable],
    module: EmbeddingBagCollection,
    output: Tensor,
    input: Tensor | Mapping[str, FeatureInput],
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Iterator[Observation]:
    """The lookups of a call of a collection, one for each feature of a watched table."""
    end = 0
    for number, (name, table) in enumerate(module.tables_of_features().items()):
        column, end = end, end + table.embedding_dim
        if table not in watched:
            continue
        if isinstance(input, Mapping):
            bags = feature_bags(name, input[name])
        else:
            assert offsets is not None  # the call would have failed
            bags = _slice(input, offsets, per_sample_weights, number, output.shape[0])
        yield Observation(table, _detached(bags), column)


def _slice(ids: Tensor, offsets: Tensor, weights: Tensor | None, feature: int, batch: int) -> Bags:
    """The bags of one feature of a feature-major call."""
    own = offsets[feature * batch : (feature + 1) * batch + 1]
    first, last = int(own[0]), int(own[-1])
    own_weights = None if weights is None else weights[first:last]
    return Bags(ids[first:last], own - first, own_weights)


def _detached(bags: Bags) -> Bags:
    """The bags with all offsets, and without autograd's history."""
    bags = bags.complete()
    weights = None if bags.weights is None else bags.weights.detach()
    return Bags(bags.ids, bags.offsets, weights)
