"""``fuse_optimizer``: the update of compressed tables happens in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embcompress.engine.fused import OPTIMIZERS, UpdateRule
from embcompress.tables.compressed_table import CompressedTable

_DEFAULT_EPS = {"sgd": 0.0, "adagrad": 1e-10, "rowwise_adagrad": 1e-8, "adam": 1e-8}


def fuse_optimizer(
    module: nn.Module,
    name: str,
    *,
    lr: float,
    eps: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> UpdateRule:
    """Update all compressed tables of a module in their backward pass.

    Only the rows that a batch touches are read and written, so a step costs what the batch
    costs, however large the table is. The tables' parameters stop requiring gradients: give the
    other parameters to an optimizer of your own. State is in buffers of each table, in its
    ``state_dict``, and is reported as ``ec.memory(module).training``.

    What it equals: ``"sgd"`` is :class:`torch.optim.SGD` and ``"adagrad"`` is
    :class:`torch.optim.Adagrad` (without decay of the rate); ``"adam"`` is
    :class:`torch.optim.SparseAdam`: moments of untouched rows do not decay.
    ``"rowwise_adagrad"`` keeps one sum for each row, of the mean squared gradient (FBGEMM's
    exact row-wise Adagrad), or for each piece of rows that overlap. With ``weight_decay``, only
    touched rows decay. Heads are updated as a whole. Where a table has a head or rows that overlap
    or are sparse and is on a GPU, whose kernels run none of these, all tables of the module take
    sparse gradients and torch's operators instead: move the module first, then fuse.

    A table that several features read is updated once, by the sum of their gradients; a store that
    tables with maxima and other tables of a collection share, once for each. Every backward pass
    is a step, and nothing comes between: no clipping, no accumulation over batches, and no
    unscaling by a ``GradScaler`` (train in bfloat16, which needs none). Replicas of
    ``DistributedDataParallel`` cannot be updated so: each would see its own gradients alone.

    Args:
        module: a table, a collection, or a model that contains some.
        name: ``"sgd"``, ``"adagrad"``, ``"rowwise_adagrad"`` or ``"adam"``.
        lr: learning rate.
        eps: added to the denominator (default: as in torch, or 1e-8 for the row-wise form).
        weight_decay: times the row, added to its gradient.
        betas: decay of Adam's moments.

    Returns:
        The rule; set its ``lr`` between steps for a schedule.

    Raises:
        ValueError: an unknown optimizer, settings that make no sense, no table in the module, or
            a table that is renormalized (``max_norm``).
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}")
    if not lr > 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"lr must be positive, weight_decay not negative and betas in [0, 1), got lr={lr}, "
            f"weight_decay={weight_decay}, betas={betas}"
        )
    tables = [child for child in module.modules() if isinstance(child, CompressedTable)]
    if not tables:
        raise ValueError("the module contains no table of embcompress; call ec.compress first")
    for table in tables:
        if table.options.max_norm is not None or table.options.scale_grad_by_freq:
            raise ValueError("tables with max_norm or scale_grad_by_freq cannot be fused")
        if table.fused_rule is not None:
            raise ValueError("the module has a fused optimizer already")
    chosen_eps = _DEFAULT_EPS[name] if eps is None else eps
    in_kernel = all(table.runs_in_kernels() for table in tables)
    rule = UpdateRule(name, lr, chosen_eps, weight_decay, betas, in_kernel)
    states: dict[Tensor, list[Tensor]] = {}  # tied stores share their state
    for table in tables:
        table.fuse(rule, states)
    return rule


def unfuse_optimizer(module: nn.Module) -> None:
    """Undo :func:`fuse_optimizer`: the tables' stores require gradients again, the state is gone.

    The stores that were fused become new parameters with the values that they have.
    """
    renewed: dict[Tensor, nn.Parameter] = {}  # tied stores stay tied
    for table in module.modules():
        if isinstance(table, CompressedTable) and table.fused_rule is not None:
            table.unfuse(renewed)


def unfused_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are left to an optimizer of the user's own."""
    fused: set[Tensor] = set()
    for child in module.modules():
        if isinstance(child, CompressedTable) and child.fused_rule is not None:
            fused.update(tensor for tensor in child.stores().values())
    return [p for p in module.parameters() if p not in fused and isinstance(p, torch.nn.Parameter)]
