"""Which ids occur: counts over a corpus, and files of ids."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 20
_DIGITS = re.compile(r"[0-9]{1,19}")


def count_ids(batches: Tensor | Iterable[Any], num_embeddings: int) -> Tensor:
    """Count ids over a corpus, which is read once and never held whole.

    Args:
        batches: a tensor or array, or any iterable of them (a data loader, a generator over
            files), of any shape; int32, int64 or smaller integers.
        num_embeddings: ids are in ``[0, num_embeddings)``.

    Returns:
        (num_embeddings,) int64, on the CPU. Beside it and one batch, 8 MiB are needed at most.

    Raises:
        TypeError: a batch that holds no integers.
        IndexError: an id outside the vocabulary, with the number of the batch.
    """
    counts = torch.zeros(num_embeddings, dtype=torch.int64)
    if isinstance(batches, Tensor) or hasattr(batches, "__array__"):
        batches = [batches]
    for number, batch in enumerate(batches):
        ids = torch.as_tensor(batch).reshape(-1).cpu()
        _check_ids(ids, num_embeddings, f"batch {number}")
        for chunk in ids.split(_CHUNK):
            counts.index_add_(0, chunk.long(), torch.ones(1, dtype=torch.int64).expand(len(chunk)))
    return counts


def _check_ids(ids: Tensor, num_embeddings: int, what: str) -> None:
    if ids.numel() == 0:
        return
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{what} must hold integer ids, got {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_embeddings:
        bad = low if low < 0 else high
        raise IndexError(f"{what} has id {bad}, which is outside [0, {num_embeddings})")


def check_unique_ids(ids: Tensor, num_embeddings: int, what: str) -> Tensor:
    """(N,) int64 from a 1-D tensor of distinct ids in ``[0, num_embeddings)``, at least one.

    Raises:
        TypeError: no integers.
        ValueError: not 1-D, empty, or with duplicates.
        IndexError: an id outside the vocabulary.
    """
    if ids.dim() != 1 or ids.numel() == 0:
        raise ValueError(f"{what} must be a 1-D tensor of ids, at least one, got {ids.shape}")
    _check_ids(ids, num_embeddings, what)
    ids = ids.long()
    distinct, counts = ids.unique(return_counts=True)
    if distinct.numel() < ids.numel():
        raise ValueError(f"{what} has id {int(distinct[counts > 1][0])} more than once")
    return ids


def read_ids(path: str | os.PathLike[str], num_embeddings: int) -> Tensor:
    """Read a vocabulary: a text file with one id a line, in decimal digits.

    Args:
        path: of the file; UTF-8, lines end in LF or CRLF.
        num_embeddings: ids must be in ``[0, num_embeddings)``.

    Returns:
        (N,) int64 in the order of the file, without duplicates.

    Raises:
        ValueError: an empty file, or a line that is not one new id, with the line's number.
    """
    first_lines: dict[int, int] = {}
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            text = line.rstrip("\r\n")
            value = int(text) if _DIGITS.fullmatch(text) else num_embeddings
            if value >= num_embeddings:
                raise ValueError(
                    f"{path}:{number}: {text[:40]!r} is not an id in [0, {num_embeddings})"
                )
            first = first_lines.setdefault(value, number)
            if first != number:
                raise ValueError(f"{path}:{number}: id {value} was already in line {first}")
    if not first_lines:
        raise ValueError(f"{path} has no ids; write one a line")
    return torch.tensor(list(first_lines), dtype=torch.int64)


def write_ids(path: str | os.PathLike[str], ids: Tensor) -> None:
    """Write a vocabulary for :func:`read_ids`; the file appears whole or not at all."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="ascii", newline="\n") as file:
            for chunk in ids.reshape(-1).split(_CHUNK):
                file.writelines(f"{value}\n" for value in chunk.tolist())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
