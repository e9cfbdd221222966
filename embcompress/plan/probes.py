"""Probes of a plan: which rows an id gathers, and what they are multiplied by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from embcompress.hashing import MASK64
from embcompress.plan.addresses import Address
from embcompress.plan.errors import require


@dataclass(frozen=True)
class Sign:
    """The row is multiplied by a hashed sign, -1 or +1."""

    kind: ClassVar[str] = "sign"
    key: int

    def __post_init__(self) -> None:
        require(0 <= self.key <= MASK64, "a sign's key must be an unsigned 64-bit integer")


@dataclass(frozen=True)
class Weight:
    """The row is multiplied by a learned number, ``store[address(id), column]``; 0 where absent."""

    kind: ClassVar[str] = "weight"
    store: str
    address: Address
    column: int = 0

    def __post_init__(self) -> None:
        require(self.column >= 0, "a weight's column must be ≥ 0")


Scale: TypeAlias = Sign | Weight


@dataclass(frozen=True)
class Probe:
    """One gather: row ``offset + address(id)`` of ``store``, times ``scale``.

    Attributes:
        store: name of a store of values.
        address: of the row.
        scale: what the row is multiplied by, or None.
        offset: added to the address.
        column: in a sum, the row is added to columns ``[column, column + width of the store)`` of
            the vector, so that a vector can be a concatenation of sums. None: from column 0 in a
            sum or product; where the row before ends in a concatenation.
    """

    store: str
    address: Address
    scale: Scale | None = None
    offset: int = 0
    column: int | None = None
