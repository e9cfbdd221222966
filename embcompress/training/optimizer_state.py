"""Optimizer state follows the rows of a table: state of torch's optimizers and of fused ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from embcompress.plan import LookupPlan
from embcompress.procedures.base import RowState
from embcompress.tables.compressed_table import CompressedTable

#: One optimizer, several (one for sparse and one for dense parameters, say), or none.
Optimizers = Optimizer | Iterable[Optimizer] | None
#: State that Adagrad does not start from zero, and the setting that it starts from.
_START_VALUES = {"sum": "initial_accumulator_value"}


def as_optimizers(optimizer: Optimizers) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple.

    Raises:
        TypeError: something without ``param_groups`` and ``state``.
    """
    if optimizer is None:
        return ()
    # Not isinstance(): wrappers of optimizers have groups and state, too.
    single = hasattr(optimizer, "param_groups")
    several: tuple[Any, ...] = (optimizer,) if single else tuple(cast(Iterable[Any], optimizer))
    for one in several:
        if not hasattr(one, "param_groups") or not hasattr(one, "state"):
            raise TypeError(f"optimizer must be a torch optimizer or several, got {one!r}")
    return several


def _is_of_rows(value: object, parameter: Tensor) -> bool:
    """Whether a value of an optimizer's state has a row for every row of the parameter."""
    if not isinstance(value, Tensor) or parameter.dim() == 0 or value.is_sparse:
        return False
    rows = parameter.shape[0]
    return value.shape in (parameter.shape, (rows,), (rows, 1))


def _groups_of(
    optimizers: Sequence[Optimizer], parameter: Tensor
) -> list[tuple[Optimizer, dict, int]]:
    """Every optimizer's group that holds the parameter, and its place there."""
    return [
        (optimizer, group, place)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for place, other in enumerate(group["params"])
        if other is parameter
    ]


def _optimizer_row_states(
    optimizers: Sequence[Optimizer], parameter: Tensor
) -> dict[tuple[Optimizer, str], RowState]:
    """State of rows by optimizer and name."""
    found = {}
    for optimizer, group, _ in _groups_of(optimizers, parameter):
        for name, value in optimizer.state.get(parameter, {}).items():
            if _is_of_rows(value, parameter):
                setting = _START_VALUES.get(name)
                fresh = float(group.get(setting, 0.0)) if setting else 0.0
                found[optimizer, name] = RowState(value, fresh)
    return found


def row_states(
    table: CompressedTable, store: str, optimizers: Sequence[Optimizer] = ()
) -> list[RowState]:
    """The state of a store's rows.

    Args:
        table: the table.
        store: name of a float store.
        optimizers: that train it; fused ones are found in the table.

    Returns:
        Every state tensor of the store's shape, (rows,) or (rows, 1), such as Adagrad's sums,
        Adam's moments and SGD's momentum.
    """
    states = list(_optimizer_row_states(optimizers, getattr(table, store)).values())
    if table.fused_rule is not None:
        states += [RowState(state, 0.0) for state in table.optimizer_states(store)]
    return states


def learning_rate(
    table: CompressedTable, store: str, optimizers: Sequence[Optimizer] = ()
) -> float:
    """The rate at which a store is trained at present; 0 where it is frozen.

    Raises:
        ValueError: neither a fused optimizer nor one of ``optimizers`` trains it.
    """
    if table.fused_rule is not None:
        return table.fused_rule.lr
    parameter = getattr(table, store)
    groups = _groups_of(optimizers, parameter)
    if groups:
        return float(groups[0][1]["lr"])
    if not parameter.requires_grad:
        return 0.0
    raise ValueError(
        f"no optimizer is known that trains {store!r}; pass it: TrainingProcedure(model, optimizer)"
    )


def take_rows(tensor: Tensor, sources: Tensor, fresh: float) -> Tensor:
    """Rows ``sources`` of a tensor; ``fresh`` where that is -1."""
    taken = tensor[sources.clamp(min=0).to(tensor.device)]
    taken[(sources < 0).to(tensor.device)] = fresh
    return taken


@torch.no_grad()
def replace_parameter(
    optimizers: Sequence[Optimizer], old: nn.Parameter, new: nn.Parameter, sources: Tensor
) -> None:
    """Let optimizers train ``new`` in place of ``old``, with the state of the rows it came from.

    Args:
        optimizers: those that do not train ``old`` are left as they are.
        old: (rows, …).
        new: (new rows, …).
        sources: (new rows,) int64, the old row of each new row; -1 for rows that start fresh.
    """
    moved = {
        key: take_rows(state.tensor, sources, state.fresh)
        for key, state in _optimizer_row_states(optimizers, old).items()
    }
    for optimizer, group, place in _groups_of(optimizers, old):
        group["params"][place] = new
        state = optimizer.state.pop(old, None)
        if state is not None:
            for name in state:
                state[name] = moved.get((optimizer, name), state[name])
            optimizer.state[new] = state


@torch.no_grad()
def replace_rows(
    table: CompressedTable,
    plan: LookupPlan,
    stores: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer] = (),
) -> None:
    """Give a table another plan and stores, in place; optimizer state follows its rows.

    Args:
        table: the table; parameters that remain float stores are replaced by new ones.
        plan: the new plan.
        stores: a tensor for each store of the plan.
        sources: for each float store, (rows,) the old row of the same store; -1 for fresh ones.
        optimizers: that train the table.
    """
    old = {name: t for name, t in table.stores().items() if isinstance(t, nn.Parameter)}
    fused = {
        name: [take_rows(state, sources[name], 0.0) for state in table.optimizer_states(name)]
        for name in (old if table.fused_rule is not None else ())
    }
    table.replace_stores(plan, stores)
    for name, parameter in old.items():
        replace_parameter(optimizers, parameter, table.get_parameter(name), sources[name])
    for name, states in fused.items():
        for current, state in zip(table.optimizer_states(name), states, strict=True):
            current.copy_(state)
