"""What the reference models have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from embcompress.collection import EmbeddingBagCollection


def multilayer_perceptron(widths: Sequence[int], *, last_activation: bool) -> nn.Sequential:
    """Linear layers with ReLU between them, drawn as in the DLRM reference.

    Weights are N(0, 2 / (inputs + outputs)), biases N(0, 1 / outputs).
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        nn.init.normal_(linear.weight, std=(2.0 / (inputs + outputs)) ** 0.5)
        nn.init.normal_(linear.bias, std=(1.0 / outputs) ** 0.5)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*(layers if last_activation else layers[:-1]))


class ClickModel(nn.Module, ABC):
    """A model of click probability over a collection of tables.

    All that such a model knows of an id comes out of the collection: the *first-order* terms of
    factorization machines and of wide parts, a weight of its own for every id in the papers, are
    linear functions of the id's vector here. A weight an id would be a second set of tables as
    long as the first, which a budget for the first would not bind: compressed to 1 %, sixteen
    columns would stand beside one uncompressed, and that one would be most of the bytes.

    Args:
        embeddings: the tables.
        num_dense: number of numeric features, ≥ 0.

    Raises:
        ValueError: a negative number of numeric features.
    """

    def __init__(self, embeddings: EmbeddingBagCollection, num_dense: int) -> None:
        super().__init__()
        if num_dense < 0:
            raise ValueError(f"num_dense must be at least 0, got {num_dense}")
        self.embeddings = embeddings
        self.num_dense = num_dense

    @property
    def inputs(self) -> int:
        """Width of all features' vectors and the numbers together."""
        return sum(self.embeddings.embedding_dims) + self.num_dense

    def concatenated(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        """(B, inputs): the pooled vectors of all features in order, then the numbers."""
        return torch.cat([self.embeddings(ids, offsets), dense], dim=1)

    @abstractmethod
    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            dense: (B, num_dense).
            ids, offsets: feature-major bags, as :meth:`EmbeddingBagCollection.forward` takes.

        Returns:
            (B,) logits.
        """


def common_width(embeddings: EmbeddingBagCollection, model: str) -> int:
    """The width of all features.

    Raises:
        ValueError: they have several; the message names the model that needs one.
    """
    widths = set(embeddings.embedding_dims)
    if len(widths) != 1:
        raise ValueError(f"{model} needs features of one width, got {sorted(widths)}")
    return widths.pop()
