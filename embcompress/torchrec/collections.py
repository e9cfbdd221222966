"""TorchRec's collections over compressed tables, run by this library's engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    EmbeddingConfig,
)
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from embcompress.collection import EmbeddingBagCollection
from embcompress.lowering.tables import LogicalTable
from embcompress.modules import Embedding, EmbeddingBag
from embcompress.tables.compressed_table import CompressedTable


def by_feature(features: KeyedJaggedTensor, names: Sequence[str]) -> dict[str, JaggedTensor]:
    """The named features, each by itself.

    Raises:
        ValueError: a feature is missing, or the features have different batch sizes.
    """
    features = maybe_td_to_kjt(features, None)
    if features.variable_stride_per_key():
        raise ValueError(
            "the features have different batch sizes, which compressed collections do not take; "
            "expand them to one batch size first"
        )
    missing = sorted(set(names) - set(features.keys()))
    if missing:
        raise ValueError(f"features lacks {missing}; it has {features.keys()}")
    return features.to_dict()


def feature_names(configs: Sequence[BaseEmbeddingConfig]) -> list[str]:
    """The features of all tables, in the order of the output."""
    return [name for config in configs for name in config.feature_names]


def output_names(configs: Sequence[BaseEmbeddingConfig]) -> list[str]:
    """What TorchRec calls the features in its output: ``feature``, or ``feature@table``."""
    return [name for names in get_embedding_names_by_table(list(configs)) for name in names]


def check_weights(features: KeyedJaggedTensor, is_weighted: bool) -> None:
    """Refuse ids without weights in a weighted collection; TorchRec's others ignore weights."""
    if is_weighted and features.weights_or_none() is None:
        raise ValueError("the collection is weighted (is_weighted=True) and the features are not")


class CompressedEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """``torchrec.EmbeddingBagCollection`` over compressed tables, looked up in one call.

    :func:`embcompress.compress` makes it. Features, tables that features share, and names are
    those of the collection that it replaces.

    Args:
        configs: of the tables that the compressed ones stand for.
        tables: a pooling table for each config, by name.
        is_weighted: whether the ids have weights.

    Attributes:
        tables: the :class:`~embcompress.EmbeddingBagCollection` that does the work, keyed by the
            names of the output.
    """

    def __init__(
        self,
        configs: Sequence[EmbeddingBagConfig],
        tables: Mapping[str, EmbeddingBag],
        is_weighted: bool = False,
    ) -> None:
        super().__init__()
        self._configs, self._is_weighted = list(configs), is_weighted
        self._feature_names = feature_names(configs)
        self._output_names = output_names(configs)
        owners = [config.name for config in configs for _ in config.feature_names]
        self._widths = [tables[owner].embedding_dim for owner in owners]
        self.tables = EmbeddingBagCollection.from_tables(
            {config.name: tables[config.name] for config in configs},
            dict(zip(self._output_names, owners, strict=True)),
        )

    @property
    def embedding_bags(self) -> nn.ModuleDict:
        """The tables by name."""
        return self.tables.embedding_bags

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs of the tables that the compressed ones stand for."""
        return self._configs

    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        return next(self.tables.parameters()).device

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors of all features.

        Args:
            features: with all features of the tables, in any order; int32 or int64 ids.

        Returns:
            Float32, with the keys of ``torchrec.EmbeddingBagCollection``.

        Raises:
            ValueError: a feature or the weights are missing, batch sizes differ, or weights with
                a table that pools by the mean.
            IndexError: an id outside its table.
        """
        check_weights(features, self._is_weighted)
        jagged = by_feature(features, self._feature_names)
        parts = [jagged[name] for name in self._feature_names]
        ids = torch.cat([part.values() for part in parts])
        offsets = F.pad(torch.cat([part.lengths() for part in parts]).cumsum(0), (1, 0))
        weights = torch.cat([p.weights() for p in parts]) if self._is_weighted else None
        pooled = self.tables(ids, offsets, weights)
        return KeyedTensor(self._output_names, self._widths, pooled.float())


class CompressedEmbeddingCollection(EmbeddingCollectionInterface):
    """``torchrec.EmbeddingCollection`` over compressed tables: a vector for every id.

    Args:
        configs: of the tables that the compressed ones stand for.
        tables: a table for each config, by name.
        need_indices: whether the output carries the ids as weights, as TorchRec's does.

    Attributes:
        embeddings: the tables by name.
    """

    def __init__(
        self,
        configs: Sequence[EmbeddingConfig],
        tables: Mapping[str, Embedding],
        need_indices: bool = False,
    ) -> None:
        super().__init__()
        self._configs, self._need_indices = list(configs), need_indices
        self._feature_names = feature_names(configs)
        self._names_by_table = get_embedding_names_by_table(self._configs)
        self.embeddings = nn.ModuleDict({config.name: tables[config.name] for config in configs})

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The configs of the tables that the compressed ones stand for."""
        return self._configs

    def need_indices(self) -> bool:
        return self._need_indices

    def embedding_dim(self) -> int:
        return self._configs[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        return self._names_by_table

    @property
    def device(self) -> torch.device:
        return next(self.embeddings.parameters()).device

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Vectors of all ids.

        Args:
            features: with all features of the tables, in any order; int32 or int64 ids.

        Returns:
            Float32 (ids of the feature, embedding_dim), by the names of
            ``torchrec.EmbeddingCollection``.

        Raises:
            ValueError: a feature is missing, or batch sizes differ.
            IndexError: an id outside its table.
        """
        jagged = by_feature(features, self._feature_names)
        output = {}
        for config, names in zip(self._configs, self._names_by_table, strict=True):
            table = self.embeddings[config.name]
            for feature, name in zip(config.feature_names, names, strict=True):
                ids = jagged[feature]
                output[name] = with_vectors(ids, table(ids.values()), self._need_indices)
        return output


def with_vectors(ids: JaggedTensor, vectors: Tensor, need_indices: bool) -> JaggedTensor:
    """Jagged vectors in place of jagged ids; these become the weights where they are needed."""
    weights = ids.values() if need_indices else None
    return JaggedTensor(values=vectors.float(), lengths=ids.lengths(), weights=weights)


COMPRESSED = (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)
Compressed = CompressedEmbeddingBagCollection | CompressedEmbeddingCollection


def configs_of(collection: Compressed) -> list[BaseEmbeddingConfig]:
    """The configs of a collection of either kind."""
    if isinstance(collection, CompressedEmbeddingBagCollection):
        return list(collection.embedding_bag_configs())
    return list(collection.embedding_configs())


def modules_of(collection: Compressed) -> dict[str, CompressedTable]:
    """The tables of a collection of either kind, by name."""
    bags = isinstance(collection, CompressedEmbeddingBagCollection)
    tables = collection.embedding_bags if bags else collection.embeddings
    return {name: table for name, table in tables.items() if isinstance(table, CompressedTable)}


def logical_tables(collection: Compressed) -> list[LogicalTable]:
    """The tables of a collection as data."""
    modules = modules_of(collection)
    return [
        LogicalTable(
            config.name,
            tuple(config.feature_names),
            modules[config.name].plan,
            modules[config.name].settings or modules[config.name].method,
        )
        for config in configs_of(collection)
    ]
