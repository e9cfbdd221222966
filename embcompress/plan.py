"""Lookup plans: which rows an id reads, and how they become its vector.

A plan is plain data. It prints, compares, hashes, goes to JSON and back, and is all that a
saved artifact, a kernel or a lowering needs to know::

    vector(id) = head( combine_t( scale_t(id) * store_t[ offset_t + address_t(id), : ] ) )
    bag        = pool over the ids of the bag

Nothing here knows about ``torch.nn``; see :mod:`embcompress.engine` for what runs a plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias, get_args

from embcompress.hashing import MASK64

Combine: TypeAlias = Literal["sum", "mul", "concat"]
SparsityForm: TypeAlias = Literal["mask", "positions"]
Pool: TypeAlias = Literal["none", "sum", "mean", "max"]
Location: TypeAlias = Literal["memory", "file"]

FLOAT_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}
_UNSIGNED = re.compile(r"uint([1-9]|1[0-9]|2[0-9]|3[0-2])")
#: Widths in bits that packed *values* may have (codes may have any width up to 32).
PACKED_VALUE_BITS = (1, 2, 4, 8, 16)
#: Ids, addresses and positions of bits are signed 64-bit integers in every engine.
INT64_END = 2**63
#: Numbers that a sparse store keeps, at most.
MOST_STORED = 2**31 - 1


class PlanError(ValueError):
    """A plan that contradicts itself, or JSON that is not a plan."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`PlanError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise PlanError(message)


# ------------------------------------------------------------------------------------ stores


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
            mapped into memory, and are not resident (:mod:`embcompress.file_tensors`).
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


# --------------------------------------------------------------------------------- addresses


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


# ------------------------------------------------------------------------------------ scales


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


# ----------------------------------------------------------------------------- probes, heads


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


@dataclass(frozen=True)
class Linear:
    """A linear head without bias; its weight is a store of ``embedding_dim`` rows."""

    kind: ClassVar[str] = "linear"
    weight: str

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of its weights."""
        return (self.weight,)


@dataclass(frozen=True)
class TensorTrain:
    """A product of the matrices, the *cores*, that lie side by side in the combined vector.

    Core k has ``ranks[k-1] * widths[k] * ranks[k]`` numbers, in this order, with a rank of 1 at
    either end. Number ``j`` of the vector, whose digits in the radices ``widths`` are ``j_1`` (the
    highest) to ``j_m``, is the product ``core_1[:, j_1, :] · … · core_m[:, j_m, :]``.

    Attributes:
        widths: digits of the columns; their product is ``embedding_dim``.
        ranks: between each core and the next.
    """

    kind: ClassVar[str] = "tensor_train"
    widths: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        require(
            len(self.widths) == len(self.ranks) + 1
            and all(number >= 1 for number in (*self.widths, *self.ranks)),
            f"a tensor train has positive widths and a rank between two of them, not widths "
            f"{self.widths} and ranks {self.ranks}",
        )

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Rank before, width and rank after of every core."""
        ranks = (1, *self.ranks, 1)
        return tuple(zip(ranks, self.widths, ranks[1:], strict=False))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of every core."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of its weights: it has none."""
        return ()


@dataclass(frozen=True)
class HashFeatures:
    """Numbers in [-1, 1] made of the id alone, by many hashes.

    Number i is ``2·h_i(x) / (buckets - 1) - 1``, where h_i is the hash into ``[0, buckets)`` with
    key ``mix64(key + i)`` (docs/hashing.md).

    Attributes:
        key: unsigned 64-bit.
        count: how many numbers.
        buckets: of each hash, at least 2, at most 2**24: so float32 tells them apart.
    """

    key: int
    count: int
    buckets: int = 1_000_000

    def __post_init__(self) -> None:
        require(0 <= self.key <= MASK64, "hash features: the key must be unsigned 64-bit")
        require(
            self.count >= 1 and 2 <= self.buckets <= 2**24,
            "hash features: count must be at least 1, buckets in [2, 2**24]",
        )


@dataclass(frozen=True)
class Network:
    """A multilayer perceptron over the combined vector, or over hashes of the id.

    Layer l gives ``W_l·v + b_l``. Between layers the sums of a vector are normalized to mean 0 and
    variance 1 (layer normalization without weights of its own), and Mish is applied.

    Attributes:
        weights: names of stores of (outputs × inputs) numbers, the first layer's first.
        biases: names of stores of (1 × outputs) numbers.
        inputs: what it reads instead of gathered rows: the plan has no probes then.
    """

    kind: ClassVar[str] = "network"
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    inputs: HashFeatures | None = None

    def __post_init__(self) -> None:
        require(
            len(self.weights) == len(self.biases) >= 1,
            "a network has as many weights as biases, and at least one",
        )

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of its weights and biases."""
        return (*self.weights, *self.biases)


Head: TypeAlias = Linear | TensorTrain | Network


@dataclass(frozen=True)
class LookupPlan:
    """Everything that says how an id becomes its vector and a bag its pooled vector.

    Attributes:
        num_embeddings: ids are in ``[0, num_embeddings)``.
        embedding_dim: width of the vector.
        stores: the physical tables, uniquely named; all that is resident at lookup time, and what
            is in files beside it.
        probes: the gathers, at least one; none where the head makes its inputs of the id.
        combine: how the probes' rows become one vector: ``"sum"`` (each row in its columns),
            ``"mul"`` (elementwise product) or ``"concat"``, always per id, before pooling.
        head: None, or what maps the combined vector: :class:`Linear`, :class:`TensorTrain` or
            :class:`Network`. All but the linear one come before pooling.
        pool: ``"none"`` (a vector for every id), ``"sum"``, ``"mean"`` or ``"max"`` over a bag.
        padding_idx: this *id* gives a zero vector, no gradient, and is not counted in a bag.
    """

    num_embeddings: int
    embedding_dim: int
    stores: tuple[Store, ...]
    probes: tuple[Probe, ...]
    combine: Combine = "sum"
    head: Head | None = None
    pool: Pool = "none"
    padding_idx: int | None = None

    def __post_init__(self) -> None:
        require(self.num_embeddings >= 1 and self.embedding_dim >= 1, "an empty table")
        require(self.num_embeddings < INT64_END, "num_embeddings must be below 2**63")
        require(self.combine in get_args(Combine), f"unknown combine {self.combine!r}")
        require(self.pool in get_args(Pool), f"unknown pool {self.pool!r}")
        require(
            (len(self.probes) == 0) == (self.inputs is not None),
            "a plan needs at least one probe, or hash features instead of probes",
        )
        names = [store.name for store in self.stores]
        require(len(set(names)) == len(names), f"store names are not unique: {names}")
        if self.padding_idx is not None:
            require(0 <= self.padding_idx < self.num_embeddings, f"padding_idx {self.padding_idx}")
        for store in self.stores:
            self._check_quantization(store)
            self._check_sparsity(store)
            self._check_threshold(store)
        for probe in self.probes:
            self._check_probe(probe)
        self._check_widths()

    # -- reading

    def store(self, name: str) -> Store:
        """The store of that name; raises :class:`PlanError` if there is none."""
        for store in self.stores:
            if store.name == name:
                return store
        raise PlanError(f"the plan has no store {name!r}, only {[s.name for s in self.stores]}")

    @property
    def inputs(self) -> HashFeatures | None:
        """What the head reads instead of gathered rows, if it does."""
        return self.head.inputs if isinstance(self.head, Network) else None

    @property
    def head_stores(self) -> tuple[str, ...]:
        """Names of the stores that the head reads as a whole."""
        return () if self.head is None else self.head.stores

    @property
    def width(self) -> int:
        """Width of the combined vector, before the head."""
        if self.inputs is not None:
            return self.inputs.count
        return max(end for _, end in self.columns)

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """Columns ``[begin, end)`` of the combined vector that each probe's row is for."""
        ranges, end = [], 0
        for probe in self.probes:
            begin = end if self.combine == "concat" else probe.column or 0
            end = begin + self.store(probe.store).width
            ranges.append((begin, end))
        return tuple(ranges)

    @property
    def bytes(self) -> int:
        """Bytes resident at lookup time: every store, code table, scale and head."""
        return sum(store.bytes for store in self.stores if not store.is_in_file)

    @property
    def offloaded(self) -> int:
        """Bytes of the stores in files, which are not resident."""
        return sum(store.bytes for store in self.stores if store.is_in_file)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the float32 table that the plan stands for."""
        return self.num_embeddings * self.embedding_dim * 4

    @property
    def is_dense(self) -> bool:
        """Whether this is the uncompressed table itself: row ``id`` of one float store."""
        store = self.stores[0]
        return (
            self.head is None
            and len(self.stores) == 1
            and store.is_float
            and store.sparsity is None
            and store.stride is None
            and store.threshold is None
            and not store.is_in_file
            and self.probes == (Probe(store.name, Digit(1, self.num_embeddings)),)
            and store.rows == self.num_embeddings
        )

    def with_pool(self, pool: Pool, padding_idx: int | None = None) -> LookupPlan:
        """The same plan for another pooling and padding id."""
        return replace(self, pool=pool, padding_idx=padding_idx)

    def with_dtypes(self, dtypes: Mapping[str, str]) -> LookupPlan:
        """The same plan with other dtypes for the named stores."""
        stores = tuple(replace(s, dtype=dtypes.get(s.name, s.dtype)) for s in self.stores)
        return self if stores == self.stores else replace(self, stores=stores)

    # -- consistency

    def _check_quantization(self, store: Store) -> None:
        if store.quantization is None:
            return
        scale = self.store(store.quantization.scale)
        parts = [scale]
        if store.quantization.bias is not None:
            parts.append(self.store(store.quantization.bias))
        for part in parts:
            self._check_dense(part, f"scale or bias of {store.name!r}")
            require(
                part.is_float
                and part.rows in (1, store.rows)
                and part.width in (1, store.width)
                and (part.rows, part.width) == (scale.rows, scale.width),
                f"store {part.name!r} does not broadcast over the rows of {store.name!r}",
            )

    def _check_sparsity(self, store: Store) -> None:
        sparsity = store.sparsity
        if sparsity is None:
            return
        index, starts = self.store(sparsity.index), self.store(sparsity.starts)
        blocks = -(-store.rows // sparsity.block)
        for part in (index, starts):
            require(
                not part.is_float and part.quantization is None,
                f"store {part.name!r} tells of the numbers of {store.name!r} and is not unsigned",
            )
        if sparsity.form == "mask":
            fits = (index.rows, index.width, index.bits) == (store.rows, store.width, 1)
        else:
            last = min(sparsity.block, store.rows) * store.width - 1
            fits = (index.rows, index.width) == (sparsity.stored, 1) and last < 2**index.bits
        require(fits, f"store {index.name!r} is no {sparsity.form} of the rows of {store.name!r}")
        require(
            (starts.rows, starts.width) == (blocks, 1) and sparsity.stored < 2**starts.bits,
            f"store {starts.name!r} does not say where {blocks} blocks of {store.name!r} begin",
        )

    def _check_threshold(self, store: Store) -> None:
        if store.threshold is None:
            return
        part = self.store(store.threshold)
        self._check_dense(part, f"threshold of {store.name!r}")
        require(
            part.is_float and part.rows in (1, store.rows) and part.width in (1, store.width),
            f"store {part.name!r} does not broadcast over the rows of {store.name!r}",
        )

    def _check_dense(self, store: Store, what: str) -> None:
        require(
            store.sparsity is None and store.stride is None and store.threshold is None,
            f"{what} is {store.name!r}, which is sparse or of rows that overlap",
        )
        require(not store.is_in_file, f"{what} is {store.name!r}, which is in a file")

    def _check_address(self, address: Address, rows: int, what: str) -> None:
        require(address.size <= rows, f"{what} reaches row {address.size - 1} of {rows}")
        if isinstance(address, Code):
            codes = self.store(address.store)
            require(
                not codes.is_float and codes.quantization is None and address.column < codes.width,
                f"{what} reads codes from {codes.name!r}, column {address.column}",
            )
            # Where absent ids have codes in another table, these few bits may be enough here.
            require(
                address.first + address.size < 2**codes.bits
                or isinstance(address.otherwise, Code | Slot),
                f"{what}: {codes.bits} bits cannot hold {address.first + address.size} codes "
                "and 'absent'",
            )
            self._check_address(address.row, codes.rows, f"row of {what}")
        if isinstance(address, Slot):
            slots = self.store(address.store)
            require(
                not slots.is_float and slots.quantization is None,
                f"{what} reads slots from {slots.name!r}",
            )
            require(
                address.tag.size < 2**slots.bits,
                f"{what}: {slots.bits} bits cannot hold {address.tag.size} tags and 'empty'",
            )
            self._check_address(address.bucket, slots.rows, f"bucket of {what}")
        if isinstance(address, Code | Slot) and address.otherwise is not None:
            self._check_address(address.otherwise, rows, f"otherwise of {what}")

    def _check_probe(self, probe: Probe) -> None:
        store = self.store(probe.store)
        what = f"probe of {store.name!r}"
        require(
            store.is_float or store.quantization is not None, f"{what} reads codes as if values"
        )
        require(probe.offset >= 0, f"{what}: negative offset")
        require(
            probe.column is None or (self.combine == "sum" and probe.column >= 0),
            f"{what} begins at column {probe.column}; only those of a sum may, at 0 or later",
        )
        self._check_address(probe.address, store.rows - probe.offset, what)
        if isinstance(probe.scale, Weight):
            weights = self.store(probe.scale.store)
            self._check_dense(weights, f"scale of {what}")
            require(
                weights.is_float and probe.scale.column < weights.width,
                f"{what} takes its scale from column {probe.scale.column} of {weights.name!r}",
            )
            self._check_address(probe.scale.address, weights.rows, f"scale of {what}")

    def _check_widths(self) -> None:
        widths = {self.store(probe.store).width for probe in self.probes}
        are_placed = any(probe.column is not None for probe in self.probes)
        require(
            self.combine == "concat" or are_placed or len(widths) <= 1,
            f"combine={self.combine!r} needs rows of one width, got {sorted(widths)}",
        )
        filled = 0
        for probe, (begin, end) in zip(self.probes, self.columns, strict=True):
            require(
                begin <= filled,
                f"probe of {probe.store!r} begins at column {begin}, those before it end at "
                f"{filled}: no column may be left out",
            )
            filled = max(filled, end)
        if self.head is None:
            require(
                self.width == self.embedding_dim,
                f"the probes give width {self.width}, not embedding_dim {self.embedding_dim}",
            )
        elif isinstance(self.head, Linear):
            self._check_weights(self.head.weight, self.embedding_dim, self.width)
        elif isinstance(self.head, TensorTrain):
            require(
                (sum(self.head.sizes), math.prod(self.head.widths))
                == (self.width, self.embedding_dim),
                f"the head maps width {sum(self.head.sizes)} to {math.prod(self.head.widths)}, "
                f"not {self.width} to {self.embedding_dim}",
            )
        else:
            self._check_network(self.head)

    def _check_network(self, network: Network) -> None:
        gathered = {probe.store for probe in self.probes}
        gathered |= {p.scale.store for p in self.probes if isinstance(p.scale, Weight)}
        require(
            len({*network.stores}) == len(network.stores) and not gathered & {*network.stores},
            "a store of the network is used twice, or gathered too",
        )
        width = self.width
        for number, (weight, bias) in enumerate(
            zip(network.weights, network.biases, strict=True), 1
        ):
            is_last = number == len(network.weights)
            outputs = self.embedding_dim if is_last else self.store(weight).rows
            self._check_weights(weight, outputs, width)
            self._check_weights(bias, 1, outputs)
            width = outputs

    def _check_weights(self, name: str, rows: int, width: int) -> None:
        """A store of the head's weights."""
        store = self.store(name)
        self._check_dense(store, "the head's weight")
        require(
            store.is_float and (store.rows, store.width) == (rows, width),
            f"the head's weight {name!r} is {store.rows} × {store.width}, not {rows} × {width}",
        )

    # -- text

    def to_json(self, *, indent: int | None = None) -> str:
        """The plan as a JSON object; :meth:`from_json` gives an equal plan back."""
        from embcompress.plan_json import encode_plan

        return encode_plan(self, indent)

    @classmethod
    def from_json(cls, text: str) -> LookupPlan:
        """Read a plan, checking everything.

        Raises:
            PlanError: if the text is not JSON, has unknown or missing fields, or contradicts
                itself.
        """
        from embcompress.plan_json import decode_plan

        return decode_plan(text)

    def __str__(self) -> str:
        sign = {"sum": " + ", "mul": " × ", "concat": " ‖ "}[self.combine]
        formula = sign.join(_probe_text(probe) for probe in self.probes)
        if self.head is not None:
            formula = _head_text(self.head, formula)
        if self.pool != "none":
            formula = f"{self.pool} over ids of {formula}"
        stores = ", ".join(_store_text(store) for store in self.stores)
        beside = f" and {self.offloaded} in files" if self.offloaded else ""
        return (
            f"{self.num_embeddings} × {self.embedding_dim} in {self.bytes} bytes{beside}: "
            f"{formula}  [{stores}]"
        )


def total_bytes(plans: Iterable[LookupPlan]) -> int:
    """Bytes of the plans' resident stores, each shared one once."""
    shared: dict[str, int] = {}
    own = 0
    for plan in plans:
        for store in plan.stores:
            if store.shared:
                shared[store.shared] = store.bytes
            elif not store.is_in_file:
                own += store.bytes
    return own + sum(shared.values())


# ---------------------------------------------------------------------------------- printing


def _store_text(store: Store) -> str:
    apart = "" if store.stride is None else f" every {store.stride}"
    text = f"{store.name} {store.rows}×{store.width}{apart} {store.dtype}"
    if store.is_in_file:
        text += " in a file"
    return text if store.sparsity is None else f"{text}, {store.sparsity.stored} kept"


def _address_text(address: Address) -> str:
    if isinstance(address, Digit):
        if address.divisor == 1:
            return f"x mod {address.radix}"
        return f"x div {address.divisor} mod {address.radix}"
    if isinstance(address, Hash):
        return f"hash_{address.key & 0xFFFF:04x}(x) of {address.buckets}"
    if isinstance(address, MurmurHash):
        return f"murmur_{address.seed}(x)[{address.word}] mod {address.buckets}"
    if isinstance(address, Slot):
        text = f"slot of {_address_text(address.tag)} in {address.store}"
        text += f"[{_address_text(address.bucket)}]"
        if address.first:
            text = f"{address.first} + {text}"
        return (
            text if address.otherwise is None else f"{text} or {_address_text(address.otherwise)}"
        )
    text = f"{address.store}[{_address_text(address.row)}, {address.column}]"
    if address.first:
        text += f" - {address.first}"
    return text if address.otherwise is None else f"{text} or {_address_text(address.otherwise)}"


def _head_text(head: Head, formula: str) -> str:
    if isinstance(head, Linear):
        return f"{head.weight} @ ({formula})"
    if isinstance(head, TensorTrain):
        shapes = " · ".join("×".join(map(str, shape)) for shape in head.shapes)
        return f"train {shapes} of ({formula})"
    if head.inputs is not None:
        formula = f"{head.inputs.count} hash features of x"
    return f"network {', '.join(head.weights)} of ({formula})"


def _probe_text(probe: Probe) -> str:
    offset = f"{probe.offset} + " if probe.offset else ""
    row = f"{probe.store}[{offset}{_address_text(probe.address)}]"
    if probe.column is not None:
        row += f"→{probe.column}"
    if isinstance(probe.scale, Sign):
        return f"±{row}"
    if isinstance(probe.scale, Weight):
        scale = probe.scale
        return f"{scale.store}[{_address_text(scale.address)}, {scale.column}]·{row}"
    return row
