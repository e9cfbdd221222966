"""Widths of tables that are learned from validation examples, and chosen under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from embcompress.methods.base import TableSpec
from embcompress.procedures.base import Observes, TableProcedure, TrainedTable
from embcompress.procedures.gated_table import COLUMNS, WEIGHT, generator_of

LOGITS, GRADIENT, SAMPLE, MOMENTS = "logits", "gradient", "sample", "moments"
_DECAYS, _TINY = (0.9, 0.999), 1e-8


class WidthSearchSettings(Protocol):
    """How weights of widths are learned; see :class:`embcompress.AutoDim`."""

    @property
    def rate(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def annealing(self) -> float: ...

    def candidates_of(self, table: TableSpec) -> tuple[int, ...]: ...


class WidthSearch(TableProcedure):
    """Learns which width a gated table should have.

    Column w is multiplied by Σ y_j over the candidate widths d_j > w, where y is a Gumbel-softmax
    sample of the logits. So the gradient of y_j is the sum, over the first d_j columns, of the
    gradients of the columns' gates; from there the chain rule leads to the logits, which make a
    step of Adam after every batch.

    Its tensors: ``logits`` and ``sample``, (candidates,); ``gradient``, (embedding_dim,) that of
    the gates since the last step; ``moments``, (2, candidates) of Adam.
    """

    observes: Observes = "gradients of vectors"
    averaged = (GRADIENT,)

    def __init__(self, settings: WidthSearchSettings) -> None:
        self.settings = settings

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        gates = table.stores()[COLUMNS]
        new = torch.zeros_like(gates[0], dtype=torch.float32)
        logits = new.new_zeros(len(self.settings.candidates_of(table.spec)))
        tensors = {
            LOGITS: logits,
            SAMPLE: self._sample(table, logits, 0),
            GRADIENT: new,
            MOMENTS: logits.new_zeros(2, len(logits)),
        }
        self._open(table, tensors[SAMPLE])
        return tensors

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        rows = table.stores()[WEIGHT].detach()[ids].float()
        found = torch.nan_to_num(amounts * rows, nan=0.0, posinf=0.0, neginf=0.0)
        table.tensor(GRADIENT).add_(found.sum(0))

    def is_due(self, number: int) -> bool:
        return True

    def step(self, table: TrainedTable, number: int) -> None:
        logits, sample, gradient = (table.tensor(name) for name in (LOGITS, SAMPLE, GRADIENT))
        of_gates = gradient.cumsum(0)
        ends = torch.tensor(self.settings.candidates_of(table.spec), device=logits.device) - 1
        of_sample = of_gates[ends]
        of_logits = sample * (of_sample - (sample * of_sample).sum()) / self._temperature(number)
        logits.sub_(self.settings.rate * self._adam(table.tensor(MOMENTS), of_logits, number))
        gradient.zero_()
        sample.copy_(self._sample(table, logits, number))
        self._open(table, sample)

    def _temperature(self, number: int) -> float:
        """Of the sample that was drawn before the step of that number."""
        return max(0.01, self.settings.temperature - self.settings.annealing * (number - 1))

    def _sample(self, table: TrainedTable, logits: Tensor, number: int) -> Tensor:
        """The weights of the candidates after the step of that number."""
        uniform = torch.rand(len(logits), generator=generator_of(table.spec, number))
        gumbel = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        return ((logits + gumbel.to(logits)) / self._temperature(number + 1)).softmax(0)

    def _open(self, table: TrainedTable, sample: Tensor) -> None:
        """Write the gates."""
        gates = table.stores()[COLUMNS]
        ends = torch.tensor(self.settings.candidates_of(table.spec), device=gates.device)
        columns = torch.arange(gates.shape[1], device=gates.device)
        reached = columns[:, None] < ends
        gates.copy_((reached * sample).sum(1)[None])

    @staticmethod
    def _adam(moments: Tensor, gradient: Tensor, number: int) -> Tensor:
        first, second = moments
        first.lerp_(gradient, 1 - _DECAYS[0])
        second.lerp_(gradient.square(), 1 - _DECAYS[1])
        mean = first / (1 - _DECAYS[0] ** number)
        square = second / (1 - _DECAYS[1] ** number)
        return mean / (square.sqrt() + _TINY)


def choose_sizes(options: Sequence[Mapping[int, tuple[int, float]]], budget: int) -> list[int]:
    """One size for each table, with the largest sum of scores whose bytes fit.

    Exact: of all ways to size the first tables only those are kept that no other beats in bytes and
    score.

    Args:
        options: for each table the sizes that it may take, each with its bytes and its score.
        budget: bytes of all.

    Raises:
        ValueError: not even the smallest sizes fit.
    """
    best: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for sizes in options:
        ways = [
            (size_bytes + own_bytes, score + own_score, (*chosen, size))
            for size_bytes, score, chosen in best
            for size, (own_bytes, own_score) in sizes.items()
            if size_bytes + own_bytes <= budget
        ]
        best = []
        for way in sorted(ways, key=lambda way: (way[0], -way[1])):
            if not best or way[1] > best[-1][1]:
                best.append(way)
    if not best:
        raise ValueError(f"not even the smallest sizes fit {budget} bytes")
    return list(best[-1][2])
