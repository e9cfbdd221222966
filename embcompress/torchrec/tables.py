"""The rows of a collection in plain tables of TorchRec's, and what is looked up in them."""

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
    EmbeddingCollection,
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
from embcompress.memory import HeldTable, HoldsTables
from embcompress.plan import LookupPlan
from embcompress.tables.compressed_table import CompressedTable

ConfigType = TypeVar("ConfigType", bound=BaseEmbeddingConfig)
_DATA_TYPES = {"float32": DataType.FP32, "float16": DataType.FP16}


class LoweredTables(HoldsTables):
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

    def held_tables(self) -> Iterator[HeldTable]:
        """The tables that the rows belong to, for :func:`embcompress.memory`.

        Raises:
            ValueError: the tables are sharded, and no process has all their rows.
        """
        for table in self.lowering.tables:
            tensors = dict(self.readers[table.name].replicated())  # type: ignore[operator]
            for physical, module in self.physical():
                weight = getattr(module, "weight", None)
                for owner, store in physical.sources:
                    if owner != table.name:
                        continue
                    if not isinstance(weight, Tensor):
                        raise ValueError(f"table {physical.name!r} is sharded; ask before that")
                    tensors[store] = weight
            method = table.method if isinstance(table.method, str) else table.method.name
            yield HeldTable(table.name, method, table.plan, tensors)

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
