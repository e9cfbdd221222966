"""Quotient-remainder and k-ary mixed-radix partitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from embcompress.layouts.factors import root_ceiling
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Combine, Digit, Hash, LookupPlan, Probe, Store


@register
@dataclass(frozen=True)
class QuotientRemainder(Method):
    """Quotient-remainder partitions, R[x mod m] ∘ Q[x div m]; every id keeps a vector of its own.

    Each of k partitions of the ids has a small table, and the k rows are combined *per id*,
    before pooling. The partitions are

    - ``"radix"``: the digits of the id in a mixed radix (k = 2: remainder and quotient);
    - ``"coprime"``: the remainders by pairwise coprime moduli (Chinese remainder theorem), which
      spread structured ids over all tables;
    - ``"hash"``: keyed hashes; two ids may then agree in all of them.

    The first two are complementary: no two ids have all rows in common.

    Memory: (m + ⌈n/m⌉)·d numbers for k = 2, at least 2√n·d; about k·n^(1/k)·d for k digits.
    With ``"concat"`` every table has a k-th of the columns.

    Source: Shi et al., "Compositional embeddings using complementary partitions", KDD 2020,
    sections 3 and 4. What differs: digits are integer arithmetic (a float quotient reads wrong
    rows past 2**24 ids), rows are combined before pooling (pooling each table first is wrong for
    bags of several ids), and the start values give the combined vector the variance of a full
    table.

    Attributes:
        combine: ``"mul"``, ``"sum"`` or ``"concat"``.
        partitions: number of partitions k, ≥ 2.
        kind: ``"radix"``, ``"coprime"`` or ``"hash"``.
    """

    name: ClassVar[str] = "qr"
    combine: Combine = "mul"
    partitions: int = 2
    kind: str = "radix"

    def __post_init__(self) -> None:
        if self.combine not in ("mul", "sum", "concat"):
            raise ValueError(f"combine must be 'mul', 'sum' or 'concat', got {self.combine!r}")
        if not isinstance(self.partitions, int) or self.partitions < 2:
            raise ValueError(f"partitions must be an integer of at least 2, got {self.partitions}")
        if self.kind not in ("radix", "coprime", "hash"):
            raise ValueError(f"kind must be 'radix', 'coprime' or 'hash', got {self.kind!r}")

    def sizes(self, table: TableSpec) -> range:
        return range(root_ceiling(table.num_embeddings, self.partitions), table.num_embeddings + 1)

    def radices(self, num_embeddings: int, modulus: int) -> tuple[int, ...]:
        """Sizes of the partitions: ``modulus`` first, the others balanced, product ≥ n."""
        radices = [modulus]
        rest = -(-num_embeddings // modulus)
        for left in range(self.partitions - 1, 0, -1):
            radix = root_ceiling(rest, left)
            if self.kind == "coprime":
                while any(math.gcd(radix, other) > 1 for other in radices):
                    radix += 1
            radices.append(radix)
            rest = -(-rest // radix)
        return tuple(radices)

    def _address(self, table: TableSpec, radices: Sequence[int], t: int) -> Digit | Hash:
        if self.kind == "hash":
            return Hash(table.key(t), radices[t])
        return Digit(math.prod(radices[:t]) if self.kind == "radix" else 1, radices[t])

    def widths(self, embedding_dim: int) -> tuple[int, ...]:
        """Columns of each digit's table."""
        if self.combine != "concat":
            return (embedding_dim,) * self.partitions
        if embedding_dim < self.partitions:
            raise ValueError(
                f"qr with combine='concat' needs embedding_dim >= partitions = {self.partitions}, "
                f"got {embedding_dim}; use combine='mul' or 'sum'"
            )
        base, extra = divmod(embedding_dim, self.partitions)
        return tuple(base + (t < extra) for t in range(self.partitions))

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        radices = self.radices(table.num_embeddings, size)
        stores, probes = [], []
        for t, (rows, width) in enumerate(
            zip(radices, self.widths(table.embedding_dim), strict=True)
        ):
            stores.append(Store(f"weight_{t}", rows, width, table.dtype))
            probes.append(Probe(f"weight_{t}", self._address(table, radices, t)))
        return LookupPlan(
            table.num_embeddings,
            table.embedding_dim,
            stores=tuple(stores),
            probes=tuple(probes),
            combine=self.combine,
        )
