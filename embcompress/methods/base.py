"""What a method is: a rule that turns a table and a size into a lookup plan."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from embcompress.hashing import derive_key
from embcompress.plan import LookupPlan
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.phases import ONE_PHASE, Phase, PhasedTable, Score, TableForm


@dataclass(frozen=True)
class TableSpec:
    """The table to be replaced.

    Attributes:
        num_embeddings: number of ids, ≥ 1.
        embedding_dim: width of a vector, ≥ 1.
        name: the table's name; hash keys are derived from it.
        seed: hash keys are derived from it.
        dtype: dtype of the float stores, such as ``"float32"``.
        counts: (num_embeddings,) how often each id occurs in the training data, or None where
            that is not known.
        queries: ids that an example looks up, on average.
        co_occurrence: (num_embeddings, k) int64, for each id up to k tokens of what it occurs with
            in the training data (:class:`embcompress.approximation.co_occurrence.CoOccurrence`), -1
            behind the last; None where that is not known.
    """

    num_embeddings: int
    embedding_dim: int
    name: str = ""
    seed: int = 0
    dtype: str = "float32"
    counts: Tensor | None = field(default=None, compare=False, repr=False)
    queries: float = 1.0
    co_occurrence: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("num_embeddings", "embedding_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if self.num_embeddings >= 2**63:
            raise ValueError(f"num_embeddings must be below 2**63, got {self.num_embeddings}")
        if not self.queries > 0:
            raise ValueError(f"queries must be positive, got {self.queries}")
        if self.counts is not None:
            self._check_counts(self.counts)
        if self.co_occurrence is not None:
            self._check_co_occurrence(self.co_occurrence)

    def _check_co_occurrence(self, samples: Tensor) -> None:
        right = samples.dim() == 2 and samples.shape[0] == self.num_embeddings and samples.shape[1]
        if not right or samples.dtype != torch.int64:
            raise ValueError(
                f"co_occurrence of table {self.name!r} must be int64 of shape "
                f"({self.num_embeddings}, k), a sample an id, got {samples.dtype} of "
                f"{tuple(samples.shape)}"
            )

    def _check_counts(self, counts: Tensor) -> None:
        if tuple(counts.shape) != (self.num_embeddings,):
            raise ValueError(
                f"counts of table {self.name!r} must have shape ({self.num_embeddings},), one "
                f"number an id, got {tuple(counts.shape)}"
            )
        if not (counts >= 0).all():  # also false for NaN
            raise ValueError(f"counts of table {self.name!r} must not be negative or NaN")

    @property
    def dense_bytes(self) -> int:
        """Bytes of the float32 table: the unit of relative budgets."""
        return self.num_embeddings * self.embedding_dim * 4

    def key(self, probe: int) -> int:
        """The hash key of one probe of this table."""
        return derive_key(self.seed, self.name, probe)


class Method(ABC):
    """A way to compress one table; its settings are the fields of a frozen dataclass.

    A method has one dial, an integer *size* (rows, a modulus, a width, …). A larger size takes
    no fewer bytes; budgets are met by searching it, so no method counts bytes itself.
    """

    #: The name in the registry; lower case, words joined by underscores.
    name: ClassVar[str]
    #: Whether it reads :attr:`TableSpec.co_occurrence`, which costs a pass over the data.
    uses_co_occurrence: ClassVar[bool] = False
    #: Whether its candidates depend on what each table is worth to a model, which costs a short
    #: training of full tables.
    uses_worths: ClassVar[bool] = False
    #: Whether the last phase may have another plan than the table was built with; then a table
    #: takes the plan of the weights that it loads.
    searches_plans: ClassVar[bool] = False
    #: Whether hash keys change while a table trains; then a module takes those of a saved state.
    renews_keys: ClassVar[bool] = False

    @abstractmethod
    def sizes(self, table: TableSpec) -> range:
        """All sizes of the dial for this table, smallest first, never empty."""

    @abstractmethod
    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        """The plan of that size, without pooling."""

    def default_size(self, table: TableSpec) -> int | None:
        """The size where no budget is given; None: what 10 % of the table allows."""
        return None

    def fill(  # noqa: B027 - most methods have nothing to write
        self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]
    ) -> None:
        """Write, in place, what is not drawn at random: codes and the like.

        Called once for a new table, after its float stores have got their start values. The same
        table gives the same bits: no global generator is used.
        """

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Stores whose vectors approximate a trained table.

        Args:
            table: what the plan was made for; its counts, where known, weigh the ids.
            plan: of this method.
            weight: (num_embeddings, embedding_dim) float.

        Returns:
            Tensors by store name: float stores of their shape, (rows, width) unless rows overlap;
            packed ones (bytes,) uint8, also quantized ones. A module that holds latents for a
            quantized store turns its codes into the latents that read as them
            (:meth:`embcompress.tables.compressed_table.CompressedTable.load_stores`).

        Here by least squares through the lookup itself (:mod:`embcompress.approximation.fitting`),
        which serves every plan of float stores: means of colliding rows for hashes, alternating
        fits of the factors for products and projections.

        Raises:
            ValueError: the method cannot start from a trained table, or the table has numbers
                that are NaN or infinite.
        """
        from embcompress.approximation.fitting import fit_stores, new_stores

        if any(s.quantization is not None or s.sparsity is not None for s in plan.stores):
            raise ValueError(
                f"method {self.name!r} cannot start from a trained table; train it from the start"
            )
        stores = new_stores(plan, table.seed)
        self.fill(table, plan, stores)
        return fit_stores(plan, stores, weight.detach(), table.counts)

    def for_trained_tables(self) -> Method:
        """The method for :meth:`fit`: itself, or one without what cannot be fitted."""
        return self

    @property
    def file_directory(self) -> str | None:
        """Where the files of stores are made; None: the directory of temporary files."""
        return None

    def candidates(self, worths: Mapping[str, float] | None = None) -> Sequence[Method]:
        """The method with other settings that may suit some data better; the best guess first.

        Where there is data, short trainings tell which (:mod:`embcompress.planner.choosing`).

        Args:
            worths: by table name, what a model loses without the table; None where that was not
                measured (:attr:`uses_worths`).
        """
        return (self,)

    def procedure(self) -> TableProcedure | None:
        """A new procedure for what happens to a table between optimizer steps; None for nothing."""
        return None

    def phases(self) -> tuple[Phase, ...]:
        """The stages in which tables are trained; most methods have one, with an open end."""
        return ONE_PHASE

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        """:meth:`procedure` for one of several phases; None for nothing."""
        return self.procedure()

    def begin_phase(
        self, phase: Phase, tables: Sequence[PhasedTable], score: Score | None
    ) -> Sequence[TableForm | None]:
        """What tables become at the start of one of several phases.

        Args:
            phase: the phase that begins. In the last one the plans must keep together to the
                bytes of those that the tables were built with (:attr:`PhasedTable.built`).
            tables: all tables of the model that this method was asked for with these settings, as
                the phase before left them, so that sizes can be chosen across tables.
            score: quality of the model on validation examples; None where the loop offers none.

        Returns:
            For each table its new form, or None to leave it as it is.

        Raises:
            ValueError: ``score`` is needed and None.
        """
        return [None] * len(tables)

    @property
    def procedure_kind(self) -> Literal["", "steps", "phases"]:
        """What a :class:`embcompress.TrainingProcedure` has to do for these settings: something
        between optimizer ``"steps"``, a loop of several ``"phases"``, or nothing."""
        if len(self.phases()) > 1:
            return "phases"
        return "" if self.procedure() is None else "steps"

    @classmethod
    def description(cls) -> str:
        """One line: the first of the class's docstring."""
        return inspect.cleandoc(cls.__doc__ or cls.name).splitlines()[0]


class JointMethod(Method):
    """A method that sizes several tables together, by one dial."""

    @abstractmethod
    def group_sizes(self, tables: Sequence[TableSpec]) -> range:
        """All sizes of the dial for these tables, smallest first, never empty."""

    @abstractmethod
    def group_plans(self, tables: Sequence[TableSpec], size: int) -> list[LookupPlan]:
        """A plan for each table; stores with the same ``shared`` name are one."""

    def of_dtype(self, dtype: str) -> JointMethod:
        """The method for tables of another dtype than the first that it sizes: itself, unless its
        tables share a store, which has one dtype.
        """
        return self

    def sizes(self, table: TableSpec) -> range:
        return self.group_sizes([table])

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        return self.group_plans([table], size)[0]
