"""How a model ranks examples: the area under the ROC curve, and how well a difference is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Outputs of a model for examples of two kinds.

    Attributes:
        of_positives: (P,) for each positive, the share of negatives with a smaller output.
        of_negatives: (N,) for each negative, the share of positives with a larger output.
            Equal outputs count half.
    """

    of_positives: Array
    of_negatives: Array

    @classmethod
    def of(cls, outputs: Array, is_positive: NDArray[np.bool_]) -> Ranking:
        """The ranking by outputs; the worst there is where these are not finite.

        Args:
            outputs: (P + N,) one an example.
            is_positive: (P + N,) labels.
        """
        positives, negatives = outputs[is_positive], outputs[~is_positive]
        if not np.isfinite(outputs).all():
            return cls(np.zeros(len(positives)), np.zeros(len(negatives)))
        return cls(_share_below(negatives, positives), 1 - _share_below(positives, negatives))

    @property
    def auc(self) -> float:
        """Area under the ROC curve: the share of pairs of two kinds that are in order.

        1/2 where all examples are of one kind.
        """
        is_mixed = len(self.of_positives) and len(self.of_negatives)
        return float(self.of_positives.mean()) if is_mixed else 0.5

    def lead(self, other: Ranking) -> tuple[float, float]:
        """How far the AUC is above another model's on the same examples, and its standard error.

        The error is that of the draw of the examples; it is small where the models rank them
        alike.

        Source: DeLong, DeLong & Clarke-Pearson, "Comparing the areas under two or more correlated
        receiver operating characteristic curves", Biometrics 1988.
        """
        variance = 0.0
        for own, others in (
            (self.of_positives, other.of_positives),
            (self.of_negatives, other.of_negatives),
        ):
            if len(own) > 1:
                variance += float((own - others).var(ddof=1)) / len(own)
        return self.auc - other.auc, math.sqrt(variance)

    def is_better(self, other: Ranking) -> bool:
        """Whether it leads by more than a standard error."""
        lead, error = self.lead(other)
        return lead > error


def _share_below(values: Array, thresholds: Array) -> Array:
    """For each threshold, the share of values below it; equal ones count half."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, thresholds, side="left")
    not_above = np.searchsorted(ordered, thresholds, side="right")
    return np.asarray((below + not_above) / (2 * max(1, len(values))))
