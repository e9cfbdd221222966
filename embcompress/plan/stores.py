"""Stores of a plan: the physical tables, and how their numbers are written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from embcompress.plan.errors import require

SparsityForm: TypeAlias = Literal["mask", "positions"]
Location: TypeAlias = Literal["memory", "file"]

FLOAT_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}
_UNSIGNED = re.compile(r"uint([1-9]|1[0-9]|2[0-9]|3[0-2])")
#: Widths in bits that packed *values* may have (codes may have any width up to 32).
PACKED_VALUE_BITS = (1, 2, 4, 8, 16)
#: Ids, addresses and positions of bits are signed 64-bit integers in every engine.
INT64_END = 2**63
#: Numbers that a sparse store keeps, at most.
MOST_STORED = 2**31 - 1


@dataclass(frozen=True)
class Quantization:
    """How the codes ``c`` of a packed store become values: ``scale * c + bias``.

    Attributes:
        scale: name of a float store whose shape broadcasts to the packed store's: 1 or
            ``rows`` rows, 1 or ``width`` columns (so per table, per column, per row).
        bias: name of a store of the same shape, or None for a symmetric code,
            ``scale * (c - (2**bits - 1) / 2)``.
        trained: whether optimizers train scale and bias. A step far smaller than an optimizer's
            own (Adam and Adagrad normalize gradients) would be torn by it.
    """

    scale: str
    bias: str | None = None
    trained: bool = True


@dataclass(frozen=True)
class Sparsity:
    """Which numbers of a store are kept, row after row; the others are zero and take no bytes.

    Rows come in blocks of ``block`` rows. The kept numbers of a block begin at a known place; which
    they are is in one of two forms, the one or the other of which is smaller:

    - ``"mask"``: a bit for every number of the store, set where it is kept;
    - ``"positions"``: for every kept number its position in its block, ``row * width + column``
      with the row counted from the block's first; rising within a block.

    Attributes:
        stored: how many numbers are kept, fixed, so that bytes follow from the plan.
        index: name of the store that says which: ``rows`` × ``width`` of uint1, or ``stored`` × 1
            of unsigned numbers that reach ``block * width - 1``.
        starts: name of a store of ⌈rows / block⌉ × 1 unsigned numbers that reach ``stored``: how
            many numbers are kept before each block.
        block: rows of a block, ≥ 1.
        form: ``"mask"`` or ``"positions"``.
    """

    stored: int
    index: str
    starts: str
    block: int
    form: SparsityForm = "mask"

    def __post_init__(self) -> None:
        require(
            1 <= self.stored <= MOST_STORED,
            f"a sparse store keeps 1 to {MOST_STORED} numbers, not {self.stored}",
        )
        require(self.block >= 1, "a block of a sparse store has at least one row")
        require(self.form in get_args(SparsityForm), f"unknown form of sparsity {self.form!r}")


@dataclass(frozen=True)
class Store:
    """A physical table of ``rows`` × ``width`` numbers.

    Attributes:
        name: name of the module's parameter or buffer that holds it.
        rows: number of rows, ≥ 1.
        width: numbers in a row, ≥ 1.
        dtype: ``"float64"``, ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"uint1"`` to
            ``"uint32"``. Unsigned stores are one stream of bits, without padding between rows:
            number ``j`` of row ``i`` starts at bit ``(i * width + j) * bits``, low bits first.
        quantization: makes the unsigned numbers of a store *values*; without it they are codes,
            which only a :class:`Code` or a :class:`Slot` may read.
        shared: where not empty, tables whose plans have a store of this ``shared`` name hold one
            and the same tensor, and its bytes count once for all of them.
        sparsity: of a float store, which of its numbers are kept; None: all.
        stride: None, or for float stores the distance between the starts of rows, less than
            ``width``: rows overlap, number ``j`` of row ``i`` is number ``i * stride + j`` of one
            array of ``(rows - 1) * stride + width`` numbers. Nothing wraps round its end.
        threshold: of a float store, the name of another of 1 or ``rows`` rows and 1 or ``width``
            columns: numbers are read through it, ``sign(v) * max(|v| - sigmoid(t), 0)``. For
            searches; the reference engine alone runs it.
        location: ``"memory"``, or for plain float stores ``"file"``: the rows are in a file that is
            mapped into memory, and are not resident (:mod:`embcompress.engine.file_tensors`).
    """

    name: str
    rows: int
    width: int
    dtype: str = "float32"
    quantization: Quantization | None = None
    shared: str = ""
    sparsity: Sparsity | None = None
    stride: int | None = None
    threshold: str | None = None
    location: Location = "memory"

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[A-Za-z_]\w*", self.name)), f"store name {self.name!r}")
        require(self.rows >= 1 and self.width >= 1, f"store {self.name!r} has no rows or columns")
        require(
            self.dtype in FLOAT_BITS or bool(_UNSIGNED.fullmatch(self.dtype)),
            f"store {self.name!r} has unknown dtype {self.dtype!r}",
        )
        if self.stride is not None:
            require(
                self.is_float and 1 <= self.stride < self.width,
                f"store {self.name!r}: a stride must be in [1, width = {self.width}) and the "
                f"numbers floats, not {self.stride} and {self.dtype!r}",
            )
        require(
            self.numbers * self.bits < INT64_END,
            f"store {self.name!r} has 2**63 bits or more",
        )
        if self.quantization is not None:
            require(
                not self.is_float and self.bits in PACKED_VALUE_BITS,
                f"store {self.name!r}: quantized values take uint1, uint2, uint4, uint8 or uint16, "
                f"not {self.dtype!r}",
            )
        if self.threshold is not None:
            require(
                self.is_float and self.sparsity is None and self.stride is None,
                f"store {self.name!r}: only floats in rows of their own have a threshold",
            )
        if self.sparsity is not None:
            require(
                self.is_float and self.stride is None,
                f"store {self.name!r}: only floats can be sparse, whose rows do not overlap",
            )
            require(
                self.sparsity.stored <= self.rows * self.width,
                f"store {self.name!r} keeps {self.sparsity.stored} of {self.rows * self.width} "
                "numbers",
            )
        require(self.location in get_args(Location), f"unknown location {self.location!r}")
        if self.is_in_file:
            require(
                self.is_float
                and self.sparsity is None
                and self.stride is None
                and self.threshold is None
                and not self.shared,
                f"store {self.name!r}: only floats in rows of their own, of one table, can be in a "
                "file",
            )

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_BITS

    @property
    def is_in_file(self) -> bool:
        return self.location == "file"

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return FLOAT_BITS[self.dtype] if self.is_float else int(self.dtype[4:])

    @property
    def step(self) -> int:
        """Numbers from the start of a row to that of the next."""
        return self.width if self.stride is None else self.stride

    @property
    def numbers(self) -> int:
        """How many numbers are stored."""
        return (self.rows - 1) * self.step + self.width

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tensor that holds the numbers of a float store.

        (rows, width); where rows overlap, the pieces that all rows are made of: as many columns
        as the greatest common divisor of stride and width.
        """
        columns = math.gcd(self.step, self.width)
        return self.numbers // columns, columns

    @property
    def bytes(self) -> int:
        """Bytes of the whole store; of a sparse one, those of the kept numbers."""
        numbers = self.numbers if self.sparsity is None else self.sparsity.stored
        return -(-numbers * self.bits // 8)
