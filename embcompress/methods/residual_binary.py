"""Sums of 1-bit codes, each of what the ones before it left over."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.approximation.fitting import principal_directions
from embcompress.layouts.latents import pack_latents
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.methods.full import Full
from embcompress.plan import Digit, Linear, LookupPlan, Probe, Quantization, Store
from embcompress.procedures.phases import Phase, PhasedTable, Score, TableForm

if TYPE_CHECKING:
    from embcompress.tables.compressed_table import CompressedTable

TableType = TypeVar("TableType", bound="CompressedTable")

_MOST_CODES = 8


@register
@dataclass(frozen=True)
class ResidualBinary(Method):
    """Residual 1-bit codes, Σ sₜ·bₜ[x]: every code has the signs of what the others left over.

    With b in {−1, +1}, a code's vector is s ∘ b / 2 for one step s a column: as a sum of u codes a
    number has 2^u values. From a trained table the codes are found one after the other (recurrent
    binarization): the signs of the residual, and the step that fits it best, twice the mean of its
    absolute values. In training every code has float latents, which lookups read by their signs
    and which learn straight through.

    Two phases: the full table is trained in ``floats``, and then in ``codes`` it is binarized and
    trained on. Rows of w < d columns, from the leading singular vectors, have a projection; the
    budget chooses u and w together, the most bits a row. :meth:`cut` makes a table of the first
    codes of a trained one.

    Memory: n·u·w bits and u·w steps (4 bytes each); for w < d also d·w numbers. u goes to 8.
    Training holds the full table in the first phase, and n·u·w float latents in the second.

    Source: Gan et al., "Binary embedding-based retrieval at Tencent", KDD 2023, section 3.1
    (recurrent binarization; residuals to any number of bits, cut at serving). What differs: there
    networks around the signs are trained on embeddings of any input, with steps 2^−t and a
    similarity of bits as the distance; a table needs no network, its latents are its own, and its
    steps are learned for every column.

    Attributes:
        codes: fixes u (None: the budget chooses), 1 to 8.
        float_epochs: passes over the training examples before the table is binarized.
    """

    name: ClassVar[str] = "residual_binary"
    codes: int | None = None
    float_epochs: int = 2

    def __post_init__(self) -> None:
        if self.codes is not None and not 1 <= self.codes <= _MOST_CODES:
            raise ValueError(f"codes must be in [1, {_MOST_CODES}], got {self.codes}")
        if self.float_epochs < 1:
            raise ValueError(f"float_epochs must be at least 1, got {self.float_epochs}")

    # -- the plan

    def shapes(self, table: TableSpec) -> tuple[tuple[int, int], ...]:
        """The pairs (u, w) of the dial, in rising order of bytes, each of more bits a row."""
        return _shapes(self, table.num_embeddings, table.embedding_dim, table.dtype)

    def sizes(self, table: TableSpec) -> range:
        return range(len(self.shapes(table)))

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        return self._plan(table, *self.shapes(table)[size])

    def _plan(self, table: TableSpec, codes: int, width: int) -> LookupPlan:
        rows, columns = table.num_embeddings, table.embedding_dim
        stores: list[Store] = []
        for t in range(codes):
            stores += [
                Store(f"scale_{t}", 1, width, table.dtype),
                Store(f"codes_{t}", rows, width, "uint1", Quantization(f"scale_{t}")),
            ]
        head = None
        if width < columns:
            stores.append(Store("projection", columns, width, table.dtype))
            head = Linear("projection")
        probes = tuple(Probe(f"codes_{t}", Digit(1, rows)) for t in range(codes))
        return LookupPlan(rows, columns, tuple(stores), probes, head=head)

    # -- from a trained table

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Recurrent binarization, of the leading singular vectors where rows are narrower.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        latents = binarized(plan, weight.detach(), table.counts)
        packed = {
            store.name: pack_latents(plan, store, latents)
            for store in plan.stores
            if store.quantization is not None
        }
        return {**latents, **packed}

    # -- phases

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("floats", self.float_epochs), Phase("codes"))

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        begin = self._float_form if phase.name == "floats" else self._code_form
        return [begin(table) for table in tables]

    @staticmethod
    def _float_form(table: PhasedTable) -> TableForm:
        full = Full().plan(table.spec, table.spec.num_embeddings)
        return TableForm(full, table.new_stores(full))

    @staticmethod
    def _code_form(table: PhasedTable) -> TableForm:
        """The codes of the trained table; latents are the residuals that they are the signs of."""
        (weight,) = table.stores().values()
        return TableForm(table.built, binarized(table.built, weight.detach(), table.spec.counts))

    # -- serving

    @staticmethod
    def cut(table: TableType, codes: int) -> TableType:
        """A copy of a trained table with its first codes alone; nothing is trained.

        Args:
            table: of this method.
            codes: to keep, 1 to those that there are.

        Raises:
            ValueError: a table of another layout, or more codes than it has.
        """
        from embcompress.cutting import cut_probes

        return cut_probes(table, codes)


@functools.lru_cache(maxsize=64)
def _shapes(
    method: ResidualBinary, rows: int, columns: int, dtype: str
) -> tuple[tuple[int, int], ...]:
    """See the method of that name; budgets ask for it again and again."""
    table = TableSpec(rows, columns, dtype=dtype)
    sized = sorted(
        (method._plan(table, codes, width).bytes, -width, codes)
        for codes in ([method.codes] if method.codes else range(1, _MOST_CODES + 1))
        for width in range(1, columns + 1)
    )
    pairs: list[tuple[int, int]] = []
    for _, negative_width, codes in sized:
        width = -negative_width
        if not pairs or codes * width > pairs[-1][0] * pairs[-1][1]:
            pairs.append((codes, width))
    return tuple(pairs)


def binarized(plan: LookupPlan, weight: Tensor, counts: Tensor | None) -> dict[str, Tensor]:
    """Stores of a plan of sign codes for a table: float latents, steps and a projection.

    Args:
        plan: of :class:`ResidualBinary`.
        weight: (num_embeddings, embedding_dim) float.
        counts: weights of the ids, or None for equal ones.

    Raises:
        ValueError: numbers that are NaN or infinite.
    """
    check_finite(weight)
    stores: dict[str, Tensor] = {}
    residual = weight.float()
    if isinstance(plan.head, Linear):
        directions = principal_directions(residual, plan.width, counts)
        residual = residual @ directions
        stores[plan.head.weight] = directions.to(
            getattr(torch, plan.store("projection").dtype)
        ).contiguous()
    importance = torch.ones(len(weight), 1, device=weight.device)
    if counts is not None:  # an id that was never seen counts a little
        importance = counts.to(importance)[:, None] + 0.1
    for probe in plan.probes:
        store = plan.store(probe.store)
        assert store.quantization is not None
        magnitude = (importance * residual.abs()).sum(0, keepdim=True) / importance.sum()
        scale = (2 * magnitude).to(getattr(torch, plan.store(store.quantization.scale).dtype))
        stores[store.quantization.scale] = scale
        stores[store.name] = residual
        # As a lookup reads it: a residual of zero lies between the codes and goes to the even one.
        residual = residual - torch.where(residual > 0, scale, -scale).float() / 2
    return stores
