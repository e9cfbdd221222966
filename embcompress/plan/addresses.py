"""Addresses of a plan: from an id to the number of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from embcompress.hashing import MASK64
from embcompress.plan.errors import require
from embcompress.plan.stores import INT64_END


@dataclass(frozen=True)
class Digit:
    """One digit of the id in a mixed radix: ``(id // divisor) % radix``.

    The identity (divisor 1, radix = number of ids), the remainder (divisor 1) and the quotient
    are all digits.
    """

    kind: ClassVar[str] = "digit"
    divisor: int
    radix: int

    def __post_init__(self) -> None:
        require(
            1 <= self.divisor < INT64_END and 1 <= self.radix < INT64_END,
            "a digit's divisor and radix must be in [1, 2**63)",
        )

    @property
    def size(self) -> int:
        return self.radix


@dataclass(frozen=True)
class Hash:
    """A keyed hash of the id into ``[0, buckets)`` (docs/hashing.md)."""

    kind: ClassVar[str] = "hash"
    key: int
    buckets: int

    def __post_init__(self) -> None:
        require(0 <= self.key <= MASK64, "a hash key must be an unsigned 64-bit integer")
        require(1 <= self.buckets < INT64_END, "a hash's buckets must be in [1, 2**63)")

    @property
    def size(self) -> int:
        return self.buckets


@dataclass(frozen=True)
class MurmurHash:
    """One of the four 32-bit words of MurmurHash3_x64_128 of the id, modulo ``buckets``.

    The hash of thinc's and spaCy's ``HashEmbed``, for tables that were trained there.

    Attributes:
        seed: unsigned 32-bit.
        word: 0 to 3; the low half of the first 64 bits, its high half, and so on.
        buckets: at least 1, at most 2**32.
    """

    kind: ClassVar[str] = "murmur"
    seed: int
    word: int
    buckets: int

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "a Murmur seed must be an unsigned 32-bit integer")
        require(0 <= self.word < 4, "a Murmur word must be in [0, 4)")
        require(1 <= self.buckets <= 2**32, "a Murmur hash's buckets must be in [1, 2**32]")

    @property
    def size(self) -> int:
        return self.buckets


#: Addresses that need nothing but the id.
DirectAddress: TypeAlias = Digit | Hash | MurmurHash


@dataclass(frozen=True)
class Code:
    """The address is read from a table of codes: ``codes[row(id), column] - first``.

    Where that is not in ``[0, size)`` the probe's vector is zero: several probes can share one
    table of codes, each with its own range. A code with all bits set is *absent*: the vector is
    zero, or takes ``otherwise``, which may be the code of another table, with more bits or fewer.

    Attributes:
        store: name of an unsigned store without quantization.
        size: number of codes of this probe; where ``otherwise`` is a code or a slot, number of
            rows that may be read, which can be more than the codes.
        row: address of the row in the table of codes.
        column: column of the table of codes.
        otherwise: address to use where the code is absent; its rows follow the same bound. A code
            or a slot here has no ``otherwise`` of its own: at most two tables are read.
        first: smallest code of this probe.
    """

    kind: ClassVar[str] = "code"
    store: str
    size: int
    row: DirectAddress
    column: int = 0
    otherwise: Address | None = None
    first: int = 0

    def __post_init__(self) -> None:
        require(self.size >= 1 and self.column >= 0, "a code's size must be ≥ 1, its column ≥ 0")
        require(self.first >= 0, "a code's first must be ≥ 0")
        _check_otherwise(self.otherwise, self.size, "a code's")


@dataclass(frozen=True)
class Slot:
    """The address is where the id's tag lies in a table of slots: a hash table of keys.

    Row ``bucket(id)`` of the table has ``width`` slots, each with a tag. Where slot ``j`` is the
    first that holds ``tag(id)``, the address is ``first + bucket(id) * width + j``, and the probe's
    vector is zero where that is not in ``[0, size)``. Where no slot holds it the id is *absent*:
    the vector is zero, or takes ``otherwise``. An empty slot has all bits set.

    The memory is that of the slots, however many ids there are. Ids that agree in bucket and tag
    are one id to the table; there are none where the tag is the id, ``Digit(1, num_embeddings)``.

    Attributes:
        store: name of an unsigned store without quantization; its rows are the buckets.
        size: number of rows that may be read, see above.
        bucket: address of the row in the table of slots.
        tag: what the slots hold of an id; less than "all bits set".
        otherwise: address to use where the id is absent; its rows follow the same bound. A code
            or a slot here has no ``otherwise`` of its own.
        first: the address of the first slot of the first bucket.
    """

    kind: ClassVar[str] = "slot"
    store: str
    size: int
    bucket: DirectAddress
    tag: DirectAddress
    otherwise: Address | None = None
    first: int = 0

    def __post_init__(self) -> None:
        require(1 <= self.size < INT64_END, "a slot's size must be in [1, 2**63)")
        require(0 <= self.first < INT64_END, "a slot's first must be in [0, 2**63)")
        _check_otherwise(self.otherwise, self.size, "a slot's")


Address: TypeAlias = DirectAddress | Code | Slot


def _check_otherwise(otherwise: Address | None, size: int, what: str) -> None:
    if otherwise is None:
        return
    require(otherwise.size <= size, f"{what} otherwise reaches past its size")
    require(
        not isinstance(otherwise, Code | Slot) or otherwise.otherwise is None,
        f"{what} otherwise goes on to a third address; at most two tables may be read",
    )
