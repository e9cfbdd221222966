"""``LookupPlan``: the whole of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from embcompress.plan.addresses import Digit
from embcompress.plan.consistency import Combine, Pool, check_plan
from embcompress.plan.errors import PlanError
from embcompress.plan.heads import HashFeatures, Head, Network
from embcompress.plan.probes import Probe
from embcompress.plan.stores import Store
from embcompress.plan.text import plan_text


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
        check_plan(self)

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

    # -- text

    def to_json(self, *, indent: int | None = None) -> str:
        """The plan as a JSON object; :meth:`from_json` gives an equal plan back."""
        from embcompress.plan.serialization import encode_plan

        return encode_plan(self, indent)

    @classmethod
    def from_json(cls, text: str) -> LookupPlan:
        """Read a plan, checking everything.

        Raises:
            PlanError: if the text is not JSON, has unknown or missing fields, or contradicts
                itself.
        """
        from embcompress.plan.serialization import decode_plan

        return decode_plan(text)

    def __str__(self) -> str:
        return plan_text(self)


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
