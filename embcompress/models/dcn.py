"""DCN-v2: a deep and cross network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embcompress.collection import EmbeddingBagCollection
from embcompress.models.base import ClickModel, multilayer_perceptron


class CrossLayer(nn.Module):
    """x₀ ⊙ (W·x + b) + x: one more degree of products of the input's numbers.

    Args:
        width: of x₀ and x.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        """(B, width) from x₀ and x of that shape."""
        return torch.addcmul(x, first, self.linear(x))


class DCN(ClickModel):
    """DCN-v2, w·[cross(x) ‖ MLP(x)] + b on the concatenation x of all vectors and numbers.

    Source: Wang et al., "DCN V2: improved deep & cross network and practical lessons for web-scale
    learning to rank systems", 2021, equations 1 and 2 and the parallel structure of section 3.4,
    with full matrices W.

    Args:
        embeddings: the tables; features may have different widths.
        num_dense: number of numeric features; 0 for none.
        cross_layers: number of cross layers, ≥ 1.
        deep_widths: widths of the deep part, at least one.

    Raises:
        ValueError: no cross layer, or no deep part.
    """

    def __init__(
        self,
        embeddings: EmbeddingBagCollection,
        num_dense: int,
        *,
        cross_layers: int = 2,
        deep_widths: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__(embeddings, num_dense)
        if cross_layers < 1:
            raise ValueError(f"cross_layers must be at least 1, got {cross_layers}")
        if not deep_widths:
            raise ValueError("deep_widths must name at least one width, got none")
        self.cross = nn.ModuleList(CrossLayer(self.inputs) for _ in range(cross_layers))
        self.deep = multilayer_perceptron([self.inputs, *deep_widths], last_activation=True)
        combined = self.inputs + deep_widths[-1]
        self.logit = multilayer_perceptron([combined, 1], last_activation=False)

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        first = crossed = self.concatenated(dense, ids, offsets)
        for layer in self.cross:
            crossed = layer(first, crossed)
        return self.logit(torch.cat([crossed, self.deep(first)], dim=1)).squeeze(1)
