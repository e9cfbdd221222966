"""What TorchRec's planner is told of a lowered model, and sharding it with its values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ShardingType

from embcompress.torchrec.lowered import LoweredTables
from embcompress.torchrec.traffic import traffic


def planner_constraints(
    model: nn.Module,
    *,
    world_size: int,
    batch_size: int,
    pooling_factors: Mapping[str, float] | None = None,
    data_parallel_bytes: int | None = None,
) -> dict[str, ParameterConstraints]:
    """Constraints for ``torchrec.distributed.planner.EmbeddingShardingPlanner``.

    Tables for which sending gradients of the whole table takes fewer bytes than exchanging ids
    and vectors (:func:`embcompress.torchrec.traffic`) are placed data-parallel; about the others
    the planner decides. It learns how many rows an example reads from each.

    Args:
        model: that :func:`embcompress.torchrec.lower` has lowered.
        world_size, batch_size, pooling_factors: as in :func:`embcompress.torchrec.traffic`.
        data_parallel_bytes: place tables of up to so many bytes data-parallel, and no others,
            whatever is sent. 0 leaves everything to the planner.

    Returns:
        By the name of TorchRec's table.
    """
    report = traffic(
        model, world_size=world_size, batch_size=batch_size, pooling_factors=pooling_factors
    )
    factors = pooling_factors or {}
    lowered = [each for each in model.modules() if isinstance(each, LoweredTables)]
    tables = [table for each in lowered for table in each.lowering.physical]
    sharded = {
        each.table
        for each in report.after
        if (
            each.placement == "sharded"
            if data_parallel_bytes is None
            else each.bytes > data_parallel_bytes
        )
    }
    return {
        table.name: ParameterConstraints(
            sharding_types=None if table.name in sharded else [ShardingType.DATA_PARALLEL.value],
            pooling_factors=[
                factors.get(feature, 1.0) * count
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
    """
    values = {
        name: tensor for name, tensor in model.state_dict().items() if tensor.device.type != "meta"
    }
    sharded = DistributedModelParallel(model, **arguments)
    sharded.load_state_dict(values)
    return sharded
