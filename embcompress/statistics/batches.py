"""Batches of ids in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcompress.collection import feature_bags
from embcompress.data.click_log import ClickLog
from embcompress.engine.bags import ID_DTYPES


@dataclass(frozen=True)
class FeatureBags:
    """Bags of one feature.

    Attributes:
        ids: (N,) int64 ids of all bags.
        lengths: (B,) int64 number of ids of each bag, or None: one each.
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64] | None

    @classmethod
    def concatenate(cls, parts: Sequence[FeatureBags]) -> FeatureBags:
        """All bags in order."""
        if len(parts) == 1:
            return parts[0]
        ids = np.concatenate([part.ids for part in parts])
        if all(part.lengths is None for part in parts):
            return cls(ids, None)
        lengths = [
            np.ones(len(part.ids), np.int64) if part.lengths is None else part.lengths
            for part in parts
        ]
        return cls(ids, np.concatenate(lengths))

    def first_ids(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The first id of some bags (0 for empty ones), and whether there is one."""
        if self.lengths is None:
            return self.ids[rows], np.ones(len(rows), bool)
        present = self.lengths[rows] > 0
        starts = (np.cumsum(self.lengths) - self.lengths)[rows]
        first = np.zeros(len(rows), np.int64)
        first[present] = self.ids[starts[present]]
        return first, present


def find_features(batch: object) -> Mapping[str, object]:
    """The mapping of features in what a data loader yields.

    Raises:
        TypeError: there is none, or several.
    """
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    mappings = [part for part in parts if isinstance(part, Mapping)]
    if len(mappings) != 1:
        raise TypeError(
            "a batch must be a mapping from feature names to ids or (ids, offsets), or a tuple "
            f"with one such mapping, got {type(batch).__name__}"
            + (f" of {[type(part).__name__ for part in parts]}" if parts is batch else "")
            + "; pass a generator that makes one"
        )
    return mappings[0]


def read_bags(batch: object, names: Sequence[str]) -> tuple[dict[str, FeatureBags], int]:
    """Bags of every feature, and their number.

    Raises:
        TypeError: the batch is no mapping, or ids are not int32 or int64.
        ValueError: other features than these, or of different numbers of rows.
    """
    features = find_features(batch)
    if set(features) != set(names):
        raise ValueError(
            f"a batch has the features {sorted(map(str, features))}, the first had {sorted(names)}"
        )
    bags = {name: _feature_bags(name, features[name]) for name in names}
    sizes = {
        name: len(bag.ids if bag.lengths is None else bag.lengths) for name, bag in bags.items()
    }
    if len(set(sizes.values())) > 1:
        raise ValueError(f"features have different numbers of rows: {sizes}")
    return bags, next(iter(sizes.values()))


def _feature_bags(name: str, value: object) -> FeatureBags:
    """Bags of one feature, as a copy: the caller may fill the same buffers again."""
    parts = value if isinstance(value, tuple) else (value,)
    tensors = tuple(_tensor(name, part) for part in parts)
    ids = tensors[0]
    if len(tensors) == 1 and not ids.is_nested and ids.dim() == 1 and ids.dtype in ID_DTYPES:
        return FeatureBags(np.array(ids.numpy(), np.int64), None)
    bags = feature_bags(name, tensors)
    lengths = np.diff(bags.offsets.numpy()).astype(np.int64)
    return FeatureBags(np.array(bags.ids.numpy(), np.int64), lengths)


def _tensor(name: str, value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"feature {name!r}: ids must be a tensor or an array, got {type(value).__name__}"
        )
    if value.dtype not in (np.int32, np.int64):
        raise TypeError(f"feature {name!r}: ids must be int32 or int64, got {value.dtype}")
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def click_log_bags(log: ClickLog, rows: slice | NDArray[np.int64]) -> dict[str, FeatureBags]:
    """Bags of every feature of some rows of a click log."""
    return {
        feature.name: FeatureBags(ids.astype(np.int64, copy=False), lengths)
        for feature, (ids, lengths) in zip(log.features, log.bags(rows), strict=True)
    }
