"""Examples that plans are tried on, and for how long."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

#: What a model is called with (a tensor, a tuple of arguments, a dict of named ones), and labels.
Example = tuple[Any, Tensor]
#: Examples that are tried on, at most: so many that a training takes seconds.
MOST_EXAMPLES = 1 << 19
_HELD_OUT = 0.1
#: Passes over the training examples, at most, and examples that a training sees altogether, unless
#: one pass is more.
MOST_PASSES, _MOST_SEEN = 4, 1 << 19


def first_batches(data: Iterable[Example], max_examples: int = MOST_EXAMPLES) -> list[Example]:
    """So many of the batches as have the first ``max_examples``, with labels as floats.

    Raises:
        TypeError: no iterable, or batches that are not pairs.
        ValueError: no batches.
    """
    try:
        iterator = iter(data)
    except TypeError:
        raise TypeError(
            "data must be batches of (inputs, labels), such as a DataLoader; got "
            f"{type(data).__name__}"
        ) from None
    batches: list[Example] = []
    count = 0
    for batch in iterator:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise TypeError(
                "data must yield pairs (inputs, labels); inputs are a tensor, a tuple of the "
                f"model's arguments or a dict of named ones; got {type(batch).__name__}{size}"
            )
        inputs, labels = batch
        batches.append((inputs, torch.as_tensor(labels).float()))
        count += batches[-1][1].numel()
        if count >= max_examples:
            break
    if not batches:
        raise ValueError("data yields no batches; give a loader, or an iterator not used up yet")
    return batches


@dataclass(frozen=True)
class TrialData:
    """Batches to try plans on.

    Attributes:
        training: batches to train on.
        validation: later batches, to compare by.
        is_prequential: whether the model will be trained on every example once, in their order, and
            is compared by what it says of each before. Then whole trainings are compared by the
            second half of all examples so.
    """

    training: list[Example]
    validation: list[Example]
    is_prequential: bool = False

    @classmethod
    def of(cls, data: Iterable[Example], max_examples: int = MOST_EXAMPLES) -> TrialData:
        """The first batches of ``data``; the last tenth of them is held out.

        Raises:
            TypeError: batches that are not pairs.
            ValueError: fewer than two batches, labels that are no probabilities, or held-out ones
                that are all alike.
        """
        batches = first_batches(data, max_examples)
        if len(batches) < 2:
            raise ValueError(f"data must yield at least 2 batches, got {len(batches)}")
        for _, labels in batches:
            wrong = labels[~((labels >= 0) & (labels <= 1))]
            if wrong.numel():
                raise ValueError(
                    "labels must be 0 or 1, or between, because the model's outputs are taken for "
                    f"logits; got {wrong[0].item():g}"
                )
        held_out = max(1, round(len(batches) * _HELD_OUT))
        result = cls(batches[:-held_out], batches[-held_out:])
        labels = result.held_out_labels
        if labels.min() == labels.max():
            raise ValueError(
                f"all {labels.numel()} held-out labels are {labels[0].item():g}; give more data, "
                "or shuffle it"
            )
        return result

    def hold_out(self) -> TrialData:
        """The training batches alone, the last tenth of them held out for a method's own search."""
        held_out = max(1, round(len(self.training) * _HELD_OUT))
        return TrialData(self.training[:-held_out] or self.training, self.training[-held_out:])

    def earlier(self) -> TrialData | None:
        """The examples before the held-out ones, of which the last as many batches are held out.

        Whether batches come in time order or not, no training sees what is later than the
        examples that it is compared by. None where too few batches are left, or held-out labels
        are all alike.
        """
        count = len(self.validation)
        result = replace(self, training=self.training[:-count], validation=self.training[-count:])
        if len(result.training) < count:
            return None
        labels = result.held_out_labels
        return result if labels.min() < labels.max() else None

    @property
    def held_out_labels(self) -> Tensor:
        """(N,) labels of the held-out examples."""
        return torch.cat([labels.reshape(-1) for _, labels in self.validation]).cpu()

    @property
    def examples(self) -> int:
        """Number of examples to train on."""
        return sum(labels.numel() for _, labels in self.training)


def full_passes(data: TrialData, most: int = MOST_PASSES) -> int:
    """Passes of a training that is not cut short: fewer, the more examples there are.

    Whole ones: the first examples that are seen again are overfitted first.
    """
    return min(most, max(1, _MOST_SEEN // data.examples))


def standard_error(data: TrialData) -> float:
    """Of the AUC of predictions for the held-out labels that are little better than chance.

    Source: Hanley & McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982,
    at an area of 1/2; it falls for larger areas.
    """
    labels = data.held_out_labels
    positive = int((labels > 0.5).sum())
    negative = labels.numel() - positive
    return math.sqrt((positive + negative + 1) / (12 * positive * negative))
