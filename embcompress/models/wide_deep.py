"""Wide & Deep: a linear model and a multilayer perceptron, trained together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from embcompress.collection import EmbeddingBagCollection
from embcompress.models.base import ClickModel, multilayer_perceptron


class WideDeep(ClickModel):
    """Wide & Deep, wᵀx + MLP(x) on the concatenation x of all vectors and numbers.

    Source: Cheng et al., "Wide & deep learning for recommender systems", 2016, equation 3. Unlike
    there the wide part is linear in the vectors (see :class:`ClickModel`), and has no crossed
    features, which their authors chose by hand for one app store. One optimizer trains both parts.

    Args:
        embeddings: the tables; features may have different widths.
        num_dense: number of numeric features; 0 for none.
        deep_widths: hidden widths of the deep part.
    """

    def __init__(
        self,
        embeddings: EmbeddingBagCollection,
        num_dense: int,
        *,
        deep_widths: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__(embeddings, num_dense)
        self.wide = nn.Linear(self.inputs, 1, bias=False)  # the deep part has a bias
        nn.init.zeros_(self.wide.weight)
        self.deep = multilayer_perceptron([self.inputs, *deep_widths, 1], last_activation=False)

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        x = self.concatenated(dense, ids, offsets)
        return (self.wide(x) + self.deep(x)).squeeze(1)
