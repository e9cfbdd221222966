"""A small model over TorchRec's collections, its batches, and how TorchRec is to shard it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torchrec
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan

#: Vocabulary of each feature; "user" is read by two tables, "clicked" by one of bags and one of
#: sequences.
FEATURES = {"user": 3000, "friend": 3000, "clicked": 5000, "country": 12}
WIDTH = 16
SHARDINGS = {
    "row_wise": row_wise,
    "table_wise": lambda: table_wise(rank=torch.distributed.get_world_size() - 1),
    "data_parallel": data_parallel,
}


class Model(nn.Module):
    """Bags and sequences of vectors, and a layer behind them."""

    def __init__(self, *, is_weighted: bool = False, device: str = "cpu") -> None:
        super().__init__()
        pooling = torchrec.PoolingType.SUM if is_weighted else torchrec.PoolingType.MEAN
        bags = [
            torchrec.EmbeddingBagConfig(
                name="users", num_embeddings=3000, embedding_dim=WIDTH,
                feature_names=["user", "friend"],
            ),
            torchrec.EmbeddingBagConfig(
                name="articles", num_embeddings=5000, embedding_dim=WIDTH,
                feature_names=["clicked", "user"], pooling=pooling,
            ),
            torchrec.EmbeddingBagConfig(
                name="countries", num_embeddings=12, embedding_dim=WIDTH,
                feature_names=["country"],
            ),
        ]  # fmt: skip
        rows = [
            torchrec.EmbeddingConfig(
                name="sequence", num_embeddings=5000, embedding_dim=WIDTH,
                feature_names=["clicked"],
            )
        ]  # fmt: skip
        where = torch.device(device)
        self.bags = torchrec.EmbeddingBagCollection(bags, is_weighted, where)
        self.rows = torchrec.EmbeddingCollection(rows, where)
        self.layer = nn.Linear(6 * WIDTH, 1, device=where)

    def forward(self, features: torchrec.KeyedJaggedTensor) -> Tensor:
        """(B,) numbers."""
        pooled = self.bags(features)
        clicked = self.rows(features)["clicked"]
        bag = torch.repeat_interleave(clicked.lengths())
        last = torch.zeros(features.stride(), WIDTH).index_add(0, bag, clicked.values().tanh())
        return self.layer(torch.cat([pooled.values(), last], dim=1)).squeeze(1)


def batch(
    step: int, size: int, part: slice = slice(None), *, is_weighted: bool = False
) -> tuple[torchrec.KeyedJaggedTensor, Tensor]:
    """Features in another order than the tables', and labels; some examples of a batch."""
    generator = torch.Generator().manual_seed(step)
    lengths = {name: torch.randint(0, 5, (size,), generator=generator) for name in FEATURES}
    bags = {
        name: [torch.randint(0, rows, (int(n),), generator=generator) for n in lengths[name]]
        for name, rows in FEATURES.items()
    }
    labels = torch.rand(size, generator=generator)
    names = list(reversed(FEATURES))
    ids = torch.cat([ids for name in names for ids in bags[name][part]])
    weights = (ids % 7 + 1).float() / 4 if is_weighted else None
    features = torchrec.KeyedJaggedTensor(
        keys=names,
        values=ids,
        weights=weights,
        lengths=torch.cat([lengths[name][part] for name in names]),
    )
    return features, labels[part]


def loss(model: nn.Module, features: torchrec.KeyedJaggedTensor, labels: Tensor) -> Tensor:
    return (model(features) - labels).square().mean()


def sharding_plan(model: nn.Module, kind: str) -> ShardingPlan:
    """Every table of TorchRec's sharded so; sequences by rows where that is data-parallel."""
    world_size = torch.distributed.get_world_size()
    plans = {}
    for path, collection, sharder in _collections(model):
        is_sequence = isinstance(collection, torchrec.EmbeddingCollection)
        own = "row_wise" if is_sequence and kind == "data_parallel" else kind
        plans[path] = construct_module_sharding_plan(
            collection,
            {name.split(".")[-2]: SHARDINGS[own]() for name in collection.state_dict()},
            sharder=sharder,
            local_size=world_size,
            world_size=world_size,
            device_type="cpu",
        )
    return ShardingPlan(plans)


def _collections(model: nn.Module) -> Iterator[tuple[str, nn.Module, object]]:
    sharders = {
        torchrec.EmbeddingBagCollection: EmbeddingBagCollectionSharder,
        torchrec.EmbeddingCollection: EmbeddingCollectionSharder,
    }
    for path, module in model.named_modules():
        if type(module) in sharders:
            yield path, module, sharders[type(module)]()
