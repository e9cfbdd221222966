"""What a method is: a rule that turns a table and a size into a lookup plan."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from embcompress.hashing import derive_key
from embcompress.plan import LookupPlan


@dataclass(frozen=True)
class TableSpec:
    """The table to be replaced.

    Attributes:
        num_embeddings: number of ids, ≥ 1.
        embedding_dim: width of a vector, ≥ 1.
        name: the table's name; hash keys are derived from it.
        seed: hash keys are derived from it.
        dtype: dtype of the float stores, such as ``"float32"``.
    """

    num_embeddings: int
    embedding_dim: int
    name: str = ""
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in ("num_embeddings", "embedding_dim"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be an integer of at least 1, got {value!r}")
        if self.num_embeddings >= 2**63:
            raise ValueError(f"num_embeddings must be below 2**63, got {self.num_embeddings}")

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

    @abstractmethod
    def sizes(self, table: TableSpec) -> range:
        """All sizes of the dial for this table, smallest first, never empty."""

    @abstractmethod
    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        """The plan of that size, without pooling."""

    @classmethod
    def description(cls) -> str:
        """One line: the first of the class's docstring."""
        return inspect.cleandoc(cls.__doc__ or cls.name).splitlines()[0]
