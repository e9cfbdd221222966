"""What methods with a row for every id share: under small budgets rows get narrower."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left

from embcompress.methods.base import Method, TableSpec
from embcompress.plan import LookupPlan


class NarrowRows(Method):
    """Rows of the table's width, or narrower ones and a projection; the dial is the width."""

    @abstractmethod
    def plan_of_width(self, table: TableSpec, width: int) -> LookupPlan:
        """The plan whose rows have that many numbers; with a projection where they are narrower."""

    def sizes(self, table: TableSpec) -> range:
        """Widths; the last one is the full width, which needs no projection."""
        whole = self.plan_of_width(table, table.embedding_dim).bytes
        narrow = range(1, table.embedding_dim)
        smaller = bisect_left(
            narrow, whole, key=lambda width: self.plan_of_width(table, width).bytes
        )
        return range(1, smaller + 2)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        is_last = size == self.sizes(table)[-1]
        return self.plan_of_width(table, table.embedding_dim if is_last else size)

    def default_size(self, table: TableSpec) -> int | None:
        return self.sizes(table)[-1]
