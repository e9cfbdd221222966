"""The 26 tables of Criteo Kaggle at their real sizes, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from measure import batches_per_sample, draw_ids
from torch import Tensor

#: Distinct ids of the 26 categorical fields of Criteo Kaggle: 33.8M, a table of width 16 is 2.2 GB.
CRITEO_CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip


@dataclass(frozen=True)
class CollectionBatch:
    """One id a feature: ``ids`` (F * B,) feature-major, and the same as one tensor a feature."""

    ids: Tensor
    offsets: Tensor
    parts: tuple[Tensor, ...]
    starts: Tensor


def make_collection_batches(
    distribution: str, batch_size: int, generator: np.random.Generator
) -> list[CollectionBatch]:
    starts = torch.arange(batch_size)
    features = len(CRITEO_CARDINALITIES)
    offsets = torch.arange(features * batch_size + 1)
    batches = []
    for _ in range(1 + batches_per_sample(features * batch_size)):
        parts = [draw_ids(distribution, n, batch_size, generator) for n in CRITEO_CARDINALITIES]
        ids = torch.cat(parts)
        batches.append(CollectionBatch(ids, offsets, ids.split(batch_size), starts))
    return batches
