"""Which features of a collection one call can run together, and what each call gets of a batch.

Most collections are one group. Maxima and heads that are not linear are torch's affair after the
kernels have gathered, so their features are calls of their own, one for each table; and so are
features whose gradients are wanted in another form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from embcompress.engine import ops
from embcompress.engine.bags import Bags, check_offsets
from embcompress.engine.dense import GradientOptions
from embcompress.engine.encoding import can_encode
from embcompress.engine.heads import is_linear
from embcompress.plan import LookupPlan


@dataclass(frozen=True)
class FeatureGroup:
    """Features of one call.

    Attributes:
        features: their numbers in the collection, rising.
        is_one_table: all of them read one table by one plan: to the call they are one feature,
            whose bags are theirs one after another.
    """

    features: tuple[int, ...]
    is_one_table: bool

    def columns(self, output: Tensor, plans: Sequence[LookupPlan]) -> Iterator[tuple[int, Tensor]]:
        """Each feature and its (B, embedding_dim) columns.

        Args:
            output: of the call.
            plans: of the call.
        """
        if self.is_one_table:
            parts = output.chunk(len(self.features))
        else:
            parts = output.split([plan.embedding_dim for plan in plans], dim=1)
        return zip(self.features, parts, strict=True)


def ends_in_torch(plan: LookupPlan) -> bool:
    """Whether something that is not linear is between the gather and the pool, or is the pool."""
    return plan.pool == "max" or not is_linear(plan.head)


def group_features(
    plans: Sequence[LookupPlan], owners: Sequence[int], options: Sequence[GradientOptions]
) -> list[FeatureGroup]:
    """The groups of the features, in the order of their first ones.

    Args:
        plans: one for each feature.
        owners: number of the table that each feature reads.
        options: how gradients of each feature are taken.
    """
    groups: dict[object, list[int]] = {}
    for feature, (plan, owner, own) in enumerate(zip(plans, owners, options, strict=True)):
        alone = ends_in_torch(plan)
        is_compiled = ops.is_available() and can_encode(plan)
        groups.setdefault(owner if alone else (is_compiled, own), []).append(feature)
    return [FeatureGroup(tuple(group), ends_in_torch(plans[group[0]])) for group in groups.values()]


class FeatureBags:
    """The bags of a batch, feature by feature.

    Args:
        bags: feature-major, complete.
        num_features: of the collection.

    Raises:
        ValueError: offsets that describe no bags of so many features.
    """

    def __init__(self, bags: Bags, num_features: int) -> None:
        check_offsets(bags.offsets, bags.ids.numel())
        batch, remainder = divmod(bags.offsets.numel() - 1, num_features)
        if remainder:
            raise ValueError(
                f"offsets has {bags.offsets.numel()} entries, which is not {num_features} "
                "features * B + 1"
            )
        self._bags, self._batch = bags, batch
        # Not by a step of the batch, which may be 0.
        self._begins: list[int] = bags.offsets[torch.arange(num_features + 1) * batch].tolist()

    def of(self, features: Sequence[int]) -> Bags:
        """The bags of some features, one after another."""
        begins, ends = self._begins, self._begins[1:]
        sizes = [ends[feature] - begins[feature] for feature in features]
        moved = list(accumulate(sizes, initial=0))
        offsets = [
            self._bags.offsets[feature * self._batch : (feature + 1) * self._batch]
            + (begin - begins[feature])
            for feature, begin in zip(features, moved, strict=False)
        ]
        last = self._bags.offsets.new_full((1,), moved[-1])
        weights = self._bags.weights
        return Bags(
            self._join(self._bags.ids, features),
            torch.cat([*offsets, last]),
            None if weights is None else self._join(weights, features),
            checked=True,
        )

    def _join(self, values: Tensor, features: Sequence[int]) -> Tensor:
        begins, ends = self._begins, self._begins[1:]
        parts = [values[begins[feature] : ends[feature]] for feature in features]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
