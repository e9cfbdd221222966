"""Evolution: lists of whole numbers that score better and better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

Genes = tuple[int, ...]
_ATTEMPTS = 50


@dataclass(frozen=True)
class Evolution:
    """How many generations of how many children.

    Attributes:
        generations: after the first, which is drawn at random.
        mutations, crossovers: children of either kind in a generation.
        parents: the best of all so far, from which the next generation comes.
        mutation_rate: probability that a gene is drawn anew.
    """

    generations: int
    mutations: int
    crossovers: int
    parents: int
    mutation_rate: float

    def best(
        self,
        most: Sequence[int],
        score: Callable[[Genes], float | None],
        generator: torch.Generator,
        first: Sequence[Genes] = (),
    ) -> Genes | None:
        """The genes with the highest score that was seen, the first of equal ones.

        Args:
            most: every gene is in [1, most].
            score: of genes, higher is better; None where they are not possible. It is asked once
                for the same genes.
            generator: of all random choices.
            first: genes to begin with, beside random ones.

        Returns:
            None where no genes that were tried are possible.
        """
        scores: dict[Genes, float] = {}
        refused: set[Genes] = set()

        def try_(genes: Genes) -> bool:
            if genes in scores or genes in refused:
                return False
            value = score(genes)
            if value is None:
                refused.add(genes)
            else:
                scores[genes] = value
            return value is not None

        def fill(count: int, child: Callable[[], Genes]) -> None:
            born = 0
            for _ in range(_ATTEMPTS * count):
                born += try_(child())
                if born == count:
                    break

        def random() -> Genes:
            return tuple(_draw(1, last + 1, generator) for last in most)

        for genes in first:
            try_(genes)
        fill(self.mutations + self.crossovers, random)
        for _ in range(self.generations):
            if not scores:
                break
            parents = sorted(scores, key=lambda genes: -scores[genes])[: self.parents]
            fill(self.mutations, partial(self._mutate, parents, most, generator))
            fill(self.crossovers, partial(_cross, parents, generator))
        return max(scores, key=lambda genes: scores[genes]) if scores else None

    def _mutate(
        self, parents: Sequence[Genes], most: Sequence[int], generator: torch.Generator
    ) -> Genes:
        parent = _pick(parents, generator)
        draws = torch.rand(len(parent), generator=generator).tolist()
        return tuple(
            _draw(1, last + 1, generator) if draw < self.mutation_rate else gene
            for gene, last, draw in zip(parent, most, draws, strict=True)
        )


def _cross(parents: Sequence[Genes], generator: torch.Generator) -> Genes:
    """Each gene from one or the other of two parents."""
    one, other = _pick(parents, generator), _pick(parents, generator)
    sides = torch.randint(2, (len(one),), generator=generator).tolist()
    return tuple(
        second if side else first for first, second, side in zip(one, other, sides, strict=True)
    )


def _pick(parents: Sequence[Genes], generator: torch.Generator) -> Genes:
    return parents[_draw(0, len(parents), generator)]


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))
