"""Collections whose rows are in plain tables of TorchRec's, which its sharders distribute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
)
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embcompress.engine import Bags
from embcompress.lowering.readers import (
    Jagged,
    PooledReader,
    TableReader,
    UnpooledReader,
    draw_store,
)
from embcompress.lowering.tables import (
    Lowering,
    PhysicalTable,
    feature_of,
    replicated_stores,
)
from embcompress.modules import CompressedTable
from embcompress.plan import LookupPlan
from embcompress.torchrec.collections import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    by_feature,
    check_weights,
    feature_names,
    output_names,
    with_vectors,
)

ConfigType = TypeVar("ConfigType", bound=BaseEmbeddingConfig)
_DATA_TYPES = {"float32": DataType.FP32, "float16": DataType.FP16}


class LoweredTables(nn.Module):
    """The tables of a collection, their rows in TorchRec's collections.

    Args:
        lowering: what is where.
        tables: the compressed tables, by name; they give their tensors up to this module.
        deviations: standard deviation of the vectors that start values give, by table.

    Attributes:
        lowering: as given.
        readers: what is replicated, by table: heads, codes and shared scales.
        small: modules of the physical tables that are replicated, by name.
        pooled: TorchRec's collection of the tables that it pools, or None.
        unpooled: TorchRec's collections of the others, by their width.
    """

    def __init__(
        self,
        lowering: Lowering,
        tables: Mapping[str, CompressedTable],
        deviations: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.lowering = lowering
        device = next(tables[lowering.tables[0].name].parameters()).device
        self.readers = nn.ModuleDict()
        for table in lowering.tables:
            reader = PooledReader if table.name in lowering.pooled else UnpooledReader
            stores = tables[table.name].stores()
            own = {s.name: stores[s.name] for s in replicated_stores(table.plan)}
            std = deviations[table.name]
            self.readers[table.name] = reader(table.plan, lowering.reads(table), own, std)
        self.small = nn.ModuleDict(
            {
                each.name: _small_table(each, lowering, tables, deviations)
                for each in lowering.physical
                if each.is_small
            }
        )
        summed = self._held(pooled=True)
        self.pooled: EmbeddingBagCollection | None = None
        if summed:
            configs = [_config(EmbeddingBagConfig, each, lowering, deviations) for each in summed]
            self.pooled = EmbeddingBagCollection(configs, lowering.is_weighted, device)
        self.unpooled = nn.ModuleDict()
        for width in sorted({each.columns for each in self._held(pooled=False)}):
            own_tables = [each for each in self._held(pooled=False) if each.columns == width]
            rows = [_config(EmbeddingConfig, each, lowering, deviations) for each in own_tables]
            self.unpooled[str(width)] = EmbeddingCollection(rows, device)
        self._take_rows(tables)

    # -- tables of TorchRec's

    def _held(self, *, pooled: bool) -> list[PhysicalTable]:
        """The tables that TorchRec holds, and pools or not."""
        return [t for t in self.lowering.physical if not t.is_small and t.pooled == pooled]

    def physical(self) -> Iterator[tuple[PhysicalTable, nn.Module]]:
        """Physical tables and the modules that hold their weights."""
        for table in self.lowering.physical:
            if table.is_small:
                yield table, self.small[table.name]
            elif table.pooled:
                assert self.pooled is not None
                yield table, self.pooled.embedding_bags[table.name]
            else:
                collection = self.unpooled[str(table.columns)]
                assert isinstance(collection.embeddings, nn.ModuleDict)
                yield table, collection.embeddings[table.name]

    @torch.no_grad()
    def _take_rows(self, tables: Mapping[str, CompressedTable]) -> None:
        """Hold the tables' own parameters, or copies where these are padded."""
        for table, module in self.physical():
            name, store = table.sources[0]
            weight = tables[name].stores()[store]
            if table.columns == table.store.width:
                module.weight = weight
            elif weight.device.type != "meta":
                target = module.weight
                assert isinstance(target, Tensor)
                target.zero_()
                target[:, : table.store.width] = weight

    def stores(self, name: str) -> dict[str, Tensor]:
        """The tensors of one table's plan by store name, without padding.

        Raises:
            ValueError: the tables are sharded; load the checkpoint into a model that is not.
        """
        stores = dict(self.readers[name].replicated())  # type: ignore[operator]
        for table, module in self.physical():
            for owner, store in table.sources:
                if owner == name:
                    weight = getattr(module, "weight", None)
                    if not isinstance(weight, Tensor) or tuple(weight.shape) != (
                        table.store.rows,
                        table.columns,
                    ):
                        raise ValueError(f"table {table.name!r} is sharded")
                    padded = table.columns != table.store.width
                    stores[store] = (
                        weight.detach()[:, : table.store.width].contiguous() if padded else weight
                    )
        return stores

    # -- looking up

    def forward(self, features: Mapping[str, JaggedTensor], weights: bool) -> dict[str, Tensor]:
        """What each table makes of each of its features, by ``feature@table``."""
        bags, requests = {}, {}
        for table in self.lowering.tables:
            reader = self._reader(table.name)
            for feature in table.features:
                jagged = features[feature]
                own = jagged.weights() if weights else None
                bag = bags[table.name, feature] = Bags(jagged.values(), jagged.offsets(), own)
                for number, each in enumerate(reader.requests(bag, self.lowering.is_weighted)):
                    requests[feature_of(table.name, feature, number)] = each
        answers = self._look_up(requests)
        output = {}
        for (name, feature), bag in bags.items():
            reader = self._reader(name)
            names = [feature_of(name, feature, number) for number in range(len(reader.reads))]
            stores = [reader.plan.store(read.store) for read in reader.reads]
            rows = [answers[n][:, : s.width] for n, s in zip(names, stores, strict=True)]
            output[f"{feature}@{name}"] = reader.assemble(bag, rows)
        return output

    def _reader(self, name: str) -> TableReader:
        reader = self.readers[name]
        assert isinstance(reader, TableReader)
        return reader

    def _look_up(self, requests: Mapping[str, Jagged]) -> dict[str, Tensor]:
        """All reads of one kind in one call of TorchRec's; sharded ones overlap."""
        waiting: list[Any] = []
        if self.pooled is not None:
            names = [feature for each in self._held(pooled=True) for feature in each.features]
            waiting.append(self.pooled(_keyed(names, requests, self.lowering.is_weighted)))
        for width, collection in self.unpooled.items():
            own = [each for each in self._held(pooled=False) if str(each.columns) == width]
            names = [feature for each in own for feature in each.features]
            waiting.append(collection(_keyed(names, requests, False)))
        answers = {
            feature: self.small[table.name](requests[feature])
            for table in self.lowering.physical
            if table.is_small
            for feature in table.features
        }
        for each in waiting:
            result = each.wait() if hasattr(each, "wait") else each
            if isinstance(result, KeyedTensor):
                answers.update(result.to_dict())
            else:
                answers.update({name: jagged.values() for name, jagged in result.items()})
        return answers


class SmallTable(nn.Module):
    """A physical table that every process holds whole.

    Args:
        plan: of a table that reads it.
        store: name of the store.
        pooled: whether rows are summed over bags.
        weight: the (rows, width) store.
        std: standard deviation of the vectors that start values give.
    """

    def __init__(
        self, plan: LookupPlan, store: str, pooled: bool, weight: nn.Parameter, std: float
    ) -> None:
        super().__init__()
        self._plan, self._store, self._pooled, self._std = plan, store, pooled, std
        self.weight = weight

    def reset_parameters(self) -> None:
        """Draw start values."""
        draw_store(self.weight, self._plan, self._store, self._std)

    def forward(self, jagged: Jagged) -> Tensor:
        """A row for each request, or their sums over the bags; float32."""
        if not self._pooled:
            return F.embedding(jagged.rows, self.weight).float()
        offsets = F.pad(jagged.lengths.cumsum(0), (1, 0))
        weights = None if jagged.weights is None else jagged.weights.to(self.weight.dtype)
        return F.embedding_bag(
            jagged.rows,
            self.weight,
            offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        ).float()


def _keyed(
    names: Sequence[str], requests: Mapping[str, Jagged], weighted: bool
) -> KeyedJaggedTensor:
    own = [requests[name] for name in names]
    weights = [each.weights for each in own if each.weights is not None]
    return KeyedJaggedTensor(
        keys=list(names),
        values=torch.cat([each.rows for each in own]),
        weights=torch.cat(weights) if weighted else None,
        lengths=torch.cat([each.lengths for each in own]),
    )


def _small_table(
    table: PhysicalTable,
    lowering: Lowering,
    tables: Mapping[str, CompressedTable],
    deviations: Mapping[str, float],
) -> SmallTable:
    name, store = table.sources[0]
    weight = tables[name].stores()[store]
    assert isinstance(weight, nn.Parameter)
    return SmallTable(lowering.plan(name), store, table.pooled, weight, deviations[name])


def _config(
    kind: type[ConfigType],
    table: PhysicalTable,
    lowering: Lowering,
    deviations: Mapping[str, float],
) -> ConfigType:
    """TorchRec's config of a physical table; it draws start values as the plan wants them."""
    name, store = table.sources[0]
    return kind(
        num_embeddings=table.store.rows,
        embedding_dim=table.columns,
        name=table.name,
        data_type=_DATA_TYPES[table.dtype],
        feature_names=list(table.features),
        init_fn=partial(draw_store, plan=lowering.plan(name), store=store, std=deviations[name]),
    )


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
