"""DLRM: a deep learning recommendation model."""

from __future__ import annotations

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


class DLRM(nn.Module):
    """Bottom MLP, pairwise dot products of all feature vectors, top MLP.

    Source: Naumov et al., "Deep learning recommendation model for personalization and
    recommendation systems", 2019, section 2.

    Args:
        embeddings: the tables; all features must have one width D.
        num_dense: number of numeric features; 0 for none (there is no bottom MLP then).
        bottom_widths: hidden widths of the bottom MLP (its last layer gives D).
        top_widths: hidden widths of the top MLP (its last layer gives the logit).

    Raises:
        ValueError: features of different widths.
    """

    def __init__(
        self,
        embeddings: EmbeddingBagCollection,
        num_dense: int,
        *,
        bottom_widths: Sequence[int] = (64, 32),
        top_widths: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__()
        widths = set(embeddings.embedding_dims)
        if len(widths) != 1:
            raise ValueError(f"DLRM needs features of one width, got {sorted(widths)}")
        (self.width,) = widths
        self.embeddings = embeddings
        self.bottom = (
            multilayer_perceptron([num_dense, *bottom_widths, self.width], last_activation=True)
            if num_dense
            else None
        )
        vectors = len(embeddings.embedding_dims) + (num_dense > 0)
        pairs = vectors * (vectors - 1) // 2
        inputs = pairs + (self.width if num_dense else 0)
        self.top = multilayer_perceptron([inputs, *top_widths, 1], last_activation=False)
        rows, columns = torch.tril_indices(vectors, vectors, offset=-1)
        self._pairs: Tensor
        self.register_buffer("_pairs", rows * vectors + columns, persistent=False)

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            dense: (B, num_dense).
            ids, offsets: feature-major bags, as :meth:`EmbeddingBagCollection.forward` takes.

        Returns:
            (B,) logits.
        """
        pooled = self.embeddings(ids, offsets)
        vectors = pooled.view(pooled.shape[0], -1, self.width)
        parts = []
        if self.bottom is not None:
            bottom = self.bottom(dense)
            vectors = torch.cat([bottom[:, None], vectors], dim=1)
            parts.append(bottom)
        dots = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        parts.append(dots.index_select(1, self._pairs))  # its backward beats that of indexing
        return self.top(torch.cat(parts, dim=1)).squeeze(1)
