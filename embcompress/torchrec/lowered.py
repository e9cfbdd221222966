"""Collections whose rows are in plain tables of TorchRec's, which its sharders distribute."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import (
    EmbeddingBagConfig,
    EmbeddingConfig,
)
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embcompress.lowering.tables import (
    Lowering,
)
from embcompress.tables.compressed_table import CompressedTable
from embcompress.torchrec.collections import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    by_feature,
    check_weights,
    feature_names,
    output_names,
    with_vectors,
)
from embcompress.torchrec.tables import LoweredTables


class LoweredEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """A :class:`CompressedEmbeddingBagCollection` whose rows are in TorchRec's tables.

    :func:`embcompress.torchrec.lower` makes it. Values and gradients are those of the collection
    that it replaces, to the order of float operations; gradients of the ids' weights are not
    handed through TorchRec's exchange of features, and asking for them is an error.

    Args:
        source: whose tables are lowered.
        lowering: of those that can be.
        deviations: standard deviation of the vectors that start values give, by table.

    Attributes:
        lowered: the tables that TorchRec holds.
        local: the others, which run data-parallel; None where there are none.
    """

    def __init__(
        self,
        source: CompressedEmbeddingBagCollection,
        lowering: Lowering,
        deviations: Mapping[str, float],
    ) -> None:
        super().__init__()
        self._configs, self._is_weighted = source.embedding_bag_configs(), source.is_weighted()
        tables = _tables(source.embedding_bags)
        self.lowered = LoweredTables(lowering, tables, deviations)
        own = {table.name for table in lowering.tables}
        rest = [config for config in self._configs if config.name not in own]
        self.local: CompressedEmbeddingBagCollection | None = None
        if rest:
            bags = {c.name: source.embedding_bags[c.name] for c in rest}
            self.local = CompressedEmbeddingBagCollection(rest, bags, self._is_weighted)  # type: ignore[arg-type]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs of the tables of the model, not those that TorchRec holds."""
        return self._configs

    def is_weighted(self) -> bool:
        return self._is_weighted

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """As :meth:`CompressedEmbeddingBagCollection.forward`."""
        check_weights(features, self._is_weighted)
        jagged = by_feature(features, feature_names(self._configs))
        if self._is_weighted and features.weights().requires_grad:
            raise ValueError(
                "the weights require a gradient, which TorchRec's exchange does not hand back; "
                "detach them, or do not lower this collection"
            )
        vectors = self.lowered(jagged, self._is_weighted)
        if self.local is not None:
            vectors.update(_by_table(self.local, self.local(features)))
        keys = [f"{f}@{config.name}" for config in self._configs for f in config.feature_names]
        widths = [config.embedding_dim for config in self._configs for _ in config.feature_names]
        values = torch.cat([vectors[key].float() for key in keys], dim=1)
        return KeyedTensor(output_names(self._configs), widths, values)


class LoweredEmbeddingCollection(EmbeddingCollectionInterface):
    """A :class:`CompressedEmbeddingCollection` whose rows are in TorchRec's tables.

    As :class:`LoweredEmbeddingBagCollection`, a vector for every id.
    """

    def __init__(
        self,
        source: CompressedEmbeddingCollection,
        lowering: Lowering,
        deviations: Mapping[str, float],
    ) -> None:
        super().__init__()
        self._configs, self._need_indices = source.embedding_configs(), source.need_indices()
        self._names_by_table = source.embedding_names_by_table()
        self.lowered = LoweredTables(lowering, _tables(source.embeddings), deviations)
        own = {table.name for table in lowering.tables}
        rest = [config for config in self._configs if config.name not in own]
        self.local: CompressedEmbeddingCollection | None = None
        if rest:
            rows = {c.name: source.embeddings[c.name] for c in rest}
            self.local = CompressedEmbeddingCollection(rest, rows, self._need_indices)  # type: ignore[arg-type]

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The configs of the tables of the model, not those that TorchRec holds."""
        return self._configs

    def need_indices(self) -> bool:
        return self._need_indices

    def embedding_dim(self) -> int:
        return self._configs[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        return self._names_by_table

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """As :meth:`CompressedEmbeddingCollection.forward`."""
        jagged = by_feature(features, feature_names(self._configs))
        vectors = self.lowered(jagged, False)
        if self.local is not None:
            local = self.local(features)
            for config, names in zip(
                self.local.embedding_configs(), self.local.embedding_names_by_table(), strict=True
            ):
                for feature, name in zip(config.feature_names, names, strict=True):
                    vectors[f"{feature}@{config.name}"] = local[name].values()
        output = {}
        for config, names in zip(self._configs, self._names_by_table, strict=True):
            for feature, name in zip(config.feature_names, names, strict=True):
                own = vectors[f"{feature}@{config.name}"]
                output[name] = with_vectors(jagged[feature], own, self._need_indices)
        return output


LOWERED = (LoweredEmbeddingBagCollection, LoweredEmbeddingCollection)


def _tables(modules: nn.ModuleDict) -> dict[str, CompressedTable]:
    return {name: table for name, table in modules.items() if isinstance(table, CompressedTable)}


def _by_table(local: CompressedEmbeddingBagCollection, pooled: KeyedTensor) -> dict[str, Tensor]:
    """The columns of each feature, by ``feature@table``."""
    configs = local.embedding_bag_configs()
    keys = [f"{f}@{config.name}" for config in configs for f in config.feature_names]
    return dict(zip(keys, pooled.values().split(pooled.length_per_key(), dim=1), strict=True))
