"""DeepFM: a factorization machine and a multilayer perceptron over the same vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embcompress.collection import EmbeddingBagCollection
from embcompress.models.base import ClickModel, common_width, multilayer_perceptron


class DeepFM(ClickModel):
    """DeepFM, Σ_f ⟨w_f, v_f⟩ + Σ_{f<g} ⟨v_f, v_g⟩ + MLP(v₁ ‖ … ‖ v_F) on the features' vectors v_f.

    A numeric feature of value x has the vector x·u with a learned u of its own. A bag is one
    vector, its pool: ids of one bag are not multiplied with each other.

    Source: Guo et al., "DeepFM: a factorization-machine based neural network for CTR prediction",
    2017, equations 1 to 4. Unlike there the first-order term of an id is linear in its vector (see
    :class:`ClickModel`).

    Args:
        embeddings: the tables; all features must have one width D.
        num_dense: number of numeric features; 0 for none.
        deep_widths: hidden widths of the deep part.

    Raises:
        ValueError: features of different widths.
    """

    def __init__(
        self,
        embeddings: EmbeddingBagCollection,
        num_dense: int,
        *,
        deep_widths: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__(embeddings, num_dense)
        self.width = common_width(embeddings, "DeepFM")
        vectors = len(embeddings.embedding_dims) + num_dense
        self.dense_vectors = nn.Parameter(torch.empty(num_dense, self.width))
        nn.init.normal_(self.dense_vectors, std=self.width**-0.5)
        self.first_order = nn.Linear(vectors * self.width, 1, bias=False)
        nn.init.zeros_(self.first_order.weight)  # the deep part has a bias
        self.deep = multilayer_perceptron(
            [vectors * self.width, *deep_widths, 1], last_activation=False
        )

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled = self.embeddings(ids, offsets)
        numeric = (dense[:, :, None] * self.dense_vectors).flatten(1)
        flat = torch.cat([pooled, numeric], dim=1)
        vectors = flat.view(len(flat), -1, self.width)
        # Σ_{f<g} ⟨v_f, v_g⟩ = (|Σ v|² − Σ |v|²) / 2
        pairs = vectors.sum(1).square().sum(1) - flat.square().sum(1)
        return (self.first_order(flat) + self.deep(flat)).squeeze(1) + pairs / 2
