"""Compressed tables in TorchRec's models: its collections, and its sharding.

:func:`embcompress.compress` swaps TorchRec's collections for
:class:`CompressedEmbeddingBagCollection` and :class:`CompressedEmbeddingCollection`, which this
library's engine runs. :func:`lower` turns these into plain TorchRec tables for
``DistributedModelParallel``, and :func:`lift` back.
"""

try:
    import torchrec  # noqa: F401
except ImportError as error:
    raise ImportError(
        "embcompress.torchrec needs torchrec and fbgemm-gpu (or fbgemm-gpu-cpu); docs/torchrec.md "
        "has the versions that go together"
    ) from error

from embcompress.torchrec.collections import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcompress.torchrec.conversion import LoweringReport, lift, lower
from embcompress.torchrec.lowered import LoweredEmbeddingBagCollection, LoweredEmbeddingCollection
from embcompress.torchrec.sharding import distribute, planner_constraints
from embcompress.torchrec.traffic import Batch, TrafficReport, traffic

__all__ = [
    "Batch",
    "CompressedEmbeddingBagCollection",
    "CompressedEmbeddingCollection",
    "LoweredEmbeddingBagCollection",
    "LoweredEmbeddingCollection",
    "LoweringReport",
    "TrafficReport",
    "distribute",
    "lift",
    "lower",
    "planner_constraints",
    "traffic",
]
