"""Bytes in, plans out: budgets are promises, kept to the byte."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache, partial

from embcompress.methods.base import JointMethod, Method, TableSpec
from embcompress.plan import LookupPlan, total_bytes

Budget = int | float | str

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")

#: Used where neither a budget nor the method's settings fix a size.
DEFAULT_BUDGET = "10%"


class BudgetError(ValueError):
    """The budget cannot be met.

    Attributes:
        smallest: bytes of the smallest budget that can.
    """

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest

    def __reduce__(self) -> tuple[type[BudgetError], tuple[str, int]]:
        return type(self), (str(self), self.smallest)


def parse_budget(budget: Budget, dense_bytes: int) -> int:
    """Bytes of a budget.

    Args:
        budget: bytes (int), ``"16MiB"``, ``"5%"`` (at most 100), or a float in (0, 1]: a fraction.
        dense_bytes: bytes of the float32 tables that fractions refer to.

    Raises:
        TypeError: a budget that is no number or string.
        ValueError: a budget that is not understood, not positive, or a share above 100 %.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float | str):
        raise TypeError(f"budget must be an int, a float or a string, got {budget!r}")
    if isinstance(budget, int):
        parsed = float(budget)
        exact = budget
    elif isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"a float budget is a fraction in (0, 1], got {budget}; bytes are int")
        exact = int(budget * dense_bytes)
        parsed = budget
    else:
        exact, parsed = _parse_text(budget, dense_bytes)
    if not parsed > 0:
        raise ValueError(f"budget must be positive, got {budget!r}")
    return exact


def _parse_text(budget: str, dense_bytes: int) -> tuple[int, float]:
    text = budget.strip()
    if match := _PERCENT.fullmatch(text):
        share = float(match[1])
        if share > 100:
            raise ValueError(
                f"budget {budget!r} is more than the dense float32 table; write at most '100%', or "
                "a number of bytes such as '16MiB' where a method is to take more"
            )
        return int(share * dense_bytes / 100), share
    match = _BYTES.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"budget {budget!r} is not understood; write 65536, '16MiB', '5%' or 0.05")
    number = float(match[1]) * _UNITS[match[2].upper()]
    return int(number), number


def format_bytes(count: int) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{int(size)} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def smallest_plan(method: Method, table: TableSpec) -> LookupPlan:
    """The plan of the method's smallest size."""
    return method.plan(table, method.sizes(table)[0])


def default_plan(method: Method, table: TableSpec) -> LookupPlan:
    """The plan where no budget is given.

    It is the method's own choice, or 10 % of the table, or the smallest size above that.
    """
    size = method.default_size(table)
    if size is not None:
        return method.plan(table, size)
    budget = parse_budget(DEFAULT_BUDGET, table.dense_bytes)
    return fit_plan(method, table, max(budget, smallest_plan(method, table).bytes))


def fit_plan(method: Method, table: TableSpec, budget_bytes: int) -> LookupPlan:
    """The largest plan of the method that takes at most ``budget_bytes``.

    Raises:
        BudgetError: not even the smallest size fits.
    """
    return _fit(method, table, budget_bytes, partial(method.plan, table))


def _fit(
    method: Method, table: TableSpec, budget_bytes: int, plan: Callable[[int], LookupPlan]
) -> LookupPlan:
    """The same, with the method's plan of each size."""
    sizes = method.sizes(table)
    # Bytes rise with the size, so the sizes that fit are the first ones.
    fitting = bisect_right(sizes, budget_bytes, key=lambda size: plan(size).bytes)
    if fitting == 0:
        smallest = plan(sizes[0]).bytes
        raise BudgetError(
            f"{_table_name(table)}: {method.name!r} cannot take {budget_bytes} bytes; the smallest "
            f"budget it can meet is {smallest} bytes "
            f"({100 * smallest / table.dense_bytes:.3g}% of the dense table)",
            smallest,
        )
    return plan(sizes[fitting - 1])


def fit_group(
    method: JointMethod, tables: Sequence[TableSpec], budget_bytes: int
) -> list[LookupPlan]:
    """The largest plans of a joint method that take at most ``budget_bytes`` together.

    Raises:
        BudgetError: not even the smallest size fits.
    """
    sizes = method.group_sizes(tables)

    def size_bytes(size: int) -> int:
        return total_bytes(method.group_plans(tables, size))

    fitting = bisect_right(sizes, budget_bytes, key=size_bytes)
    if fitting == 0:
        smallest = size_bytes(sizes[0])
        dense = sum(table.dense_bytes for table in tables)
        raise BudgetError(
            f"{len(tables)} tables: {method.name!r} cannot take {budget_bytes} bytes; the smallest "
            f"budget it can meet is {smallest} bytes ({100 * smallest / dense:.3g}% of the dense "
            "tables)",
            smallest,
        )
    return method.group_plans(tables, sizes[fitting - 1])


def default_plans(method: Method, tables: Sequence[TableSpec]) -> list[LookupPlan]:
    """The plans of several tables where no budget is given."""
    if not isinstance(method, JointMethod):
        return [default_plan(method, table) for table in tables]
    smallest = total_bytes(method.group_plans(tables, method.group_sizes(tables)[0]))
    budget = parse_budget(DEFAULT_BUDGET, sum(table.dense_bytes for table in tables))
    return fit_group(method, tables, max(budget, smallest))


def _table_name(table: TableSpec) -> str:
    name = f"table {table.name!r}" if table.name else "table"
    return f"{name} of {table.num_embeddings} × {table.embedding_dim}"


def allocate(
    tables: Sequence[TableSpec],
    methods: Sequence[Method],
    budget_bytes: int,
    full: Callable[[TableSpec], LookupPlan],
) -> list[LookupPlan]:
    """Plans for several tables under one budget.

    Tables of a :class:`~embcompress.methods.base.JointMethod` are sized by it, within their share
    of the budget: that of their dense bytes. Of the others, every table may take up to a common
    level of bytes, the highest that the budget allows. So a table smaller than the level stays
    full: an id of a small table is seen often, and its bytes buy more there than in the tail of a
    large one. What remains of the budget because sizes are discrete is given to the tables one
    after another, smallest first.

    Args:
        tables: the tables.
        methods: the method of each.
        budget_bytes: for all of them together.
        full: the uncompressed plan of a table.

    Returns:
        A plan for each table; the uncompressed one where that is no larger.

    Raises:
        BudgetError: naming the smallest budget for all tables together.
    """
    plans: dict[int, LookupPlan] = {}
    dense = sum(table.dense_bytes for table in tables)
    left = budget_bytes
    for method, members in _joint_groups(tables, methods).items():
        own = [tables[index] for index in members]
        share = budget_bytes * sum(table.dense_bytes for table in own) // dense
        fitted = [
            _no_larger_than_full(plan, full(table))
            for plan, table in zip(fit_group(method, own, share), own, strict=True)
        ]
        plans.update(zip(members, fitted, strict=True))
        left -= total_bytes(fitted)
    others = [index for index in range(len(tables)) if index not in plans]
    if others:
        levelled = _level(
            [tables[index] for index in others], [methods[index] for index in others], left, full
        )
        plans.update(zip(others, levelled, strict=True))
    return [plans[index] for index in range(len(tables))]


def _joint_groups(
    tables: Sequence[TableSpec], methods: Sequence[Method]
) -> dict[JointMethod, list[int]]:
    """The tables that each joint method sizes together."""
    groups: dict[JointMethod, list[int]] = {}
    first: dict[JointMethod, str] = {}
    for index, (table, method) in enumerate(zip(tables, methods, strict=True)):
        if isinstance(method, JointMethod):
            is_first = first.setdefault(method, table.dtype) == table.dtype
            own = method if is_first else method.of_dtype(table.dtype)
            groups.setdefault(own, []).append(index)
    return groups


def _no_larger_than_full(plan: LookupPlan, full: LookupPlan) -> LookupPlan:
    """The plan, or the uncompressed one where that takes fewer bytes.

    A plan with a shared store is kept: the others that share it need it.
    """
    shares = any(store.shared for store in plan.stores)
    return plan if shares or plan.bytes < full.bytes else full


def _level(
    tables: Sequence[TableSpec],
    methods: Sequence[Method],
    budget_bytes: int,
    full: Callable[[TableSpec], LookupPlan],
) -> list[LookupPlan]:
    """Plans of at most a common level of bytes; see :func:`allocate`."""
    dense_plans = [full(table) for table in tables]
    # Many levels are tried, and the searches for a size of each begin alike.
    plans_of = [cache(partial(m.plan, t)) for m, t in zip(methods, tables, strict=True)]
    smallest_bytes = [
        plan(method.sizes(table)[0]).bytes
        for plan, method, table in zip(plans_of, methods, tables, strict=True)
    ]

    def fit(index: int, level: int) -> LookupPlan:
        """The best plan of the table within the level, or its smallest plan above it."""
        level = max(level, smallest_bytes[index])
        if dense_plans[index].bytes <= level:
            return dense_plans[index]
        return _fit(methods[index], tables[index], level, plans_of[index])

    def total(plans: Sequence[LookupPlan]) -> int:
        return sum(plan.bytes for plan in plans)

    def at_level(level: int) -> list[LookupPlan]:
        return [fit(index, level) for index in range(len(tables))]

    smallest = total(at_level(0))
    if smallest > budget_bytes:
        names = ", ".join(sorted({method.name for method in methods}))
        dense = sum(table.dense_bytes for table in tables)
        raise BudgetError(
            f"{len(tables)} tables cannot take {budget_bytes} bytes with {names}; the smallest "
            f"budget they can meet is {smallest} bytes ({100 * smallest / dense:.3g}% of the dense "
            "tables)",
            smallest,
        )
    level = _highest(0, budget_bytes, lambda level: total(at_level(level)) <= budget_bytes)
    plans = at_level(level)
    left = budget_bytes - total(plans)
    for index in sorted(range(len(tables)), key=lambda index: tables[index].dense_bytes):
        grown = fit(index, plans[index].bytes + left)
        left -= grown.bytes - plans[index].bytes
        plans[index] = grown
    return plans


def _highest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Largest integer in [low, high] for which the monotone ``holds`` is true; it is at low."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
