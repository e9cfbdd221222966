"""Compressed embedding tables for PyTorch: one lookup API, one engine, many methods."""

from embcompress.budget import BudgetError
from embcompress.collection import EmbeddingBagCollection, TableConfig
from embcompress.deployment import deploy
from embcompress.memory import MemoryReport, memory
from embcompress.methods import Method, method_classes, methods, register, resolve_method
from embcompress.modules import Embedding, EmbeddingBag
from embcompress.optimizers import fuse_optimizer, unfused_parameters
from embcompress.plan import LookupPlan, PlanError
from embcompress.pruning.ids import count_ids, read_ids, write_ids
from embcompress.pruning.tables import prune_, restore_
from embcompress.pruning.token_vocabulary import TokenVocabulary
from embcompress.pruning.vocabularies import prune_vocabulary, restore_vocabulary
from embcompress.statistics import Profile, ProfileInterrupted, ProfileSettings, profile
from embcompress.surgery.swapping import CompressionReport, compress
from embcompress.training.training_procedure import TrainingProcedure

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
    "Profile",
    "ProfileInterrupted",
    "ProfileSettings",
    "TableConfig",
    "TokenVocabulary",
    "TrainingProcedure",
    "compress",
    "count_ids",
    "deploy",
    "fuse_optimizer",
    "memory",
    "methods",
    "profile",
    "prune_",
    "prune_vocabulary",
    "read_ids",
    "register",
    "resolve_method",
    "restore_",
    "restore_vocabulary",
    "unfused_parameters",
    "write_ids",
]

# Every method's class, such as ``QuotientRemainder``, is public without an edit here.
globals().update(method_classes())
__all__ += [*method_classes()]
