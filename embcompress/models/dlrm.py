"""DLRM: a deep learning recommendation model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embcompress.collection import EmbeddingBagCollection
from embcompress.models.base import ClickModel, common_width, multilayer_perceptron


class DLRM(ClickModel):
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
        super().__init__(embeddings, num_dense)
        self.width = common_width(embeddings, "DLRM")
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
