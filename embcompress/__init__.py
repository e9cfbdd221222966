"""Compressed embedding tables for PyTorch: one lookup API, one engine, many methods."""

from embcompress.budget import BudgetError
from embcompress.collection import EmbeddingBagCollection, TableConfig
from embcompress.memory import MemoryReport, memory
from embcompress.methods import Method, method_classes, methods, register, resolve_method
from embcompress.modules import Embedding, EmbeddingBag
from embcompress.optimizers import fuse_optimizer
from embcompress.plan import LookupPlan, PlanError
from embcompress.surgery import CompressionReport, compress

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CompressionReport",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "LookupPlan",
    "MemoryReport",
    "Method",
    "PlanError",
    "TableConfig",
    "compress",
    "fuse_optimizer",
    "memory",
    "methods",
    "register",
    "resolve_method",
]

# Every method's class, such as ``QuotientRemainder``, is public without an edit here.
globals().update(method_classes())
__all__ += [*method_classes()]
