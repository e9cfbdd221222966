"""What TorchRec's planner is told of a lowered model, and sharding it with its values."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ShardingType

from embcompress.torchrec.tables import LoweredTables
from embcompress.torchrec.traffic import Batch

#: All but data-parallel.
_SHARDING_TYPES = [
    ShardingType.TABLE_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
]


def planner_constraints(model: nn.Module, batch: Batch) -> dict[str, ParameterConstraints]:
    """Constraints for ``torchrec.distributed.planner.EmbeddingShardingPlanner``.

    They say how many rows an example reads from each table, and that the table is to be divided:
    what is better replicated is so already (:func:`embcompress.torchrec.lower`). How to divide
    it is the planner's choice.

    Args:
        model: that :func:`embcompress.torchrec.lower` has lowered.
        batch: of the processes.

    Returns:
        By the name of TorchRec's table.
    """
    lowered = [each for each in model.modules() if isinstance(each, LoweredTables)]
    tables = [table for each in lowered for table in each.lowering.physical if not table.is_small]
    return {
        table.name: ParameterConstraints(
            sharding_types=_SHARDING_TYPES,
            pooling_factors=[
                batch.ids(feature) / batch.size * count
                for feature, count in zip(table.model_features, table.queries, strict=True)
            ],
        )
        for table in tables
    }


def distribute(model: nn.Module, **arguments: Any) -> DistributedModelParallel:
    """``DistributedModelParallel`` that keeps the model's values.

    TorchRec draws the rows of sharded tables anew; here they are loaded from the model, as far as
    it is not on the meta device. Every process must hold the same values.

    Args:
        model: that :func:`embcompress.torchrec.lower` has lowered.
        arguments: of ``DistributedModelParallel``.

    Raises:
        ValueError: on a CPU, unpooled tables by FBGEMM's dense kernel, which pools there whatever
            it is asked for: shard them, and give them an optimizer in the backward pass.
    """
    values = model.state_dict()
    sharded = DistributedModelParallel(model, **arguments)
    _check_kernels(sharded)
    drawn = sharded.state_dict()
    on_meta = [name for name, tensor in values.items() if tensor.device.type == "meta"]
    sharded.load_state_dict({**values, **{name: drawn[name] for name in on_meta}})
    return sharded


def _check_kernels(sharded: DistributedModelParallel) -> None:
    if sharded.device.type != "cpu":
        return
    for path, tables in sharded.plan.plan.items():
        if not isinstance(sharded.module.get_submodule(path), ShardedEmbeddingCollection):
            continue
        for name, placement in tables.items():
            if placement.compute_kernel == EmbeddingComputeKernel.DENSE.value:
                raise ValueError(
                    f"table {name!r} of {path} is not pooled and has the dense kernel, which pools "
                    "on a CPU; take planner_constraints, and apply_optimizer_in_backward before "
                    "the plan is made"
                )
