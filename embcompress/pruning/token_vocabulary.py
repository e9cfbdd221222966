"""The map between the tokens of a language model and the rows that it was cut to."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: The token id that stands for "every pruned token".
FALLBACK = -1


@dataclass(frozen=True)
class TokenVocabulary:
    """Which tokens a model was cut to: the map between token ids and rows.

    Attributes:
        num_embeddings: tokens of the model before.
        token_ids: (rows,) int64, the token of each row of the embedding and of each logit of a
            tied output layer; -1 where that is the fallback, which stands for all pruned tokens.
        remaps: whether the model takes the old token ids and maps them itself.
        embeddings, outputs: paths of the pruned embeddings and output layers.
        backup: the pruned tokens' vectors as they were, rising by token: a tensor on the CPU,
            the path of a ``.npy`` file, or None.
        biases: by path of an output layer, the pruned tokens' biases as they were, on the CPU.
        padding: by path of an embedding, the ``padding_idx`` that it had.
    """

    num_embeddings: int
    token_ids: Tensor
    remaps: bool = True
    embeddings: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    backup: Tensor | Path | None = None
    biases: dict[str, Tensor] = field(default_factory=dict)
    padding: dict[str, int | None] = field(default_factory=dict)

    def encode(self, token_ids: Tensor, *, ignore_index: int | None = -100) -> Tensor:
        """Rows (which are logit numbers, too) of token ids.

        For the labels of a model with a pruned output layer, and for the input of a model that
        does not remap.

        Args:
            token_ids: (*) integers.
            ignore_index: a value that stays what it is, as in ``cross_entropy``; or None.

        Returns:
            (*) int64; pruned tokens get row 0, the fallback's.

        Raises:
            IndexError: a token outside the old vocabulary.
        """
        ids = token_ids.long().contiguous()
        ignored = torch.zeros_like(ids, dtype=torch.bool)
        if ignore_index is not None:
            ignored = ids == ignore_index
        outside = ((ids < 0) | (ids >= self.num_embeddings)) & ~ignored
        if bool(outside.any()):
            raise IndexError(f"token {int(ids[outside][0])} is outside [0, {self.num_embeddings})")
        tokens, order = self.token_ids.to(ids.device).sort()
        place = torch.searchsorted(tokens, ids).clamp(max=tokens.numel() - 1)
        rows = torch.where(tokens[place] == ids, order[place], 0)
        return torch.where(ignored, ids, rows)

    def decode(self, rows: Tensor) -> Tensor:
        """(*) int64 token ids of rows, such as the arguments of the largest logits.

        The fallback gives -1: mask logit 0 where :attr:`token_ids` begins with -1.
        """
        return self.token_ids.to(rows.device)[rows.long()]

    def pruned_tokens(self) -> Tensor:
        """(P,) int64 the tokens that have no row, rising."""
        pruned = torch.ones(self.num_embeddings, dtype=torch.bool)
        pruned[self.token_ids[self.token_ids >= 0].cpu()] = False
        return pruned.nonzero().flatten()


def save_backup(
    backup: str | os.PathLike[str] | None, weight: Tensor, pruned: Tensor
) -> Tensor | Path | None:
    """Keep the pruned rows of a weight; see :func:`embcompress.prune_vocabulary`."""
    if backup is None:
        return None
    rows = weight.detach()[pruned.to(weight.device)].cpu()
    if backup == "memory":
        return rows
    path = Path(backup)
    if path.suffix != ".npy":
        raise ValueError(f"backup must be 'memory' or the path of a .npy file, got {backup!r}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npy")
    try:
        np.save(temporary, _as_numpy(rows), allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _as_numpy(rows: Tensor) -> np.ndarray:
    """The rows' bits where numpy lacks the dtype."""
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()


def load_backup(vocabulary: TokenVocabulary, count: int, weight: Tensor) -> Tensor | None:
    """The (count, width) rows of a backup, None where there is none.

    Raises:
        ValueError: it holds something else.
    """
    if vocabulary.backup is None:
        return None
    rows = vocabulary.backup
    if isinstance(rows, Path):
        rows = torch.from_numpy(np.load(rows, allow_pickle=False))
        if rows.dtype == torch.int16 and weight.dtype == torch.bfloat16:
            rows = rows.view(torch.bfloat16)
    if tuple(rows.shape) != (count, weight.shape[1]) or not rows.is_floating_point():
        raise ValueError(
            f"the backup holds {tuple(rows.shape)} numbers of {rows.dtype}, expected "
            f"{(count, weight.shape[1])} of {weight.dtype}"
        )
    return rows.to(weight.dtype)
