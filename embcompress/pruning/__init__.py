"""Ids counted and kept in files; tables and vocabularies that lose the ids that matter least."""

from embcompress.pruning.ids import count_ids, read_ids, write_ids
from embcompress.pruning.tables import prune_, restore_
from embcompress.pruning.token_vocabulary import TokenVocabulary
from embcompress.pruning.vocabularies import prune_vocabulary, restore_vocabulary

__all__ = [
    "TokenVocabulary",
    "count_ids",
    "prune_",
    "prune_vocabulary",
    "read_ids",
    "restore_",
    "restore_vocabulary",
    "write_ids",
]
