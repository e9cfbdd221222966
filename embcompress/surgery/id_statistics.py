"""What batches of data say of the ids of a model's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from embcompress.approximation.co_occurrence import NOTHING, CoOccurrence
from embcompress.planner.lookups import count_lookups, sample_company
from embcompress.planner.progress import Show, silent
from embcompress.planner.trial_data import Example
from embcompress.surgery.table_building import Table
from embcompress.surgery.table_finding import Candidate


def with_statistics(
    model: nn.Module,
    candidates: Sequence[Candidate],
    tables: Sequence[Table],
    batches: Sequence[Example],
    show: Show = silent,
) -> list[Table]:
    """The tables with counts of their ids and, for methods that use it, what these occur with.

    What was given with a table stays as it is.

    Args:
        model: is called with the batches, in evaluation mode.
        candidates: all tables of the model, whose ids are the company of the others.
        tables: those that are to be swapped.
        batches: (inputs, labels).
        show: is told which batch it is.
    """
    counted = _with_counts(model, tables, batches, show)
    return _with_company(model, candidates, counted, batches, show)


def _with_counts(
    model: nn.Module, tables: Sequence[Table], batches: Sequence[Example], show: Show
) -> list[Table]:
    unknown = [
        module for each in tables if each.spec.counts is None for module in each.candidate.modules
    ]
    if not unknown:
        return list(tables)
    seen = count_lookups(model, unknown, batches, show)
    result = []
    for each in tables:
        counts = [seen[module] for module in each.candidate.modules if module in seen]
        spec = each.spec if not counts else replace(each.spec, counts=sum(counts[1:], counts[0]))
        result.append(replace(each, spec=spec))
    return result


def _with_company(
    model: nn.Module,
    candidates: Sequence[Candidate],
    tables: Sequence[Table],
    batches: Sequence[Example],
    show: Show,
) -> list[Table]:
    features = {module: paths[0] for each in candidates for module, paths in each.modules.items()}
    found: dict[int, CoOccurrence] = {}
    samples: dict[str, CoOccurrence] = {}
    for number, each in enumerate(tables):
        if each.method.uses_co_occurrence and each.spec.co_occurrence is None:
            found[number] = CoOccurrence(each.spec.num_embeddings)
            samples |= dict.fromkeys(
                (features[module] for module in each.candidate.modules), found[number]
            )
    if not found:
        return list(tables)
    sample_company(model, features, samples, batches, show)
    known = {number: company.samples() for number, company in found.items()}
    return [
        replace(each, spec=replace(each.spec, co_occurrence=known[number]))
        if number in known and _has_any(known[number])
        else each
        for number, each in enumerate(tables)
    ]


def _has_any(samples: Tensor) -> bool:
    return bool((samples != NOTHING).any())
