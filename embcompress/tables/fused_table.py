"""Tables whose stores a fused optimizer updates: in the backward pass of the kernels, or in torch
as soon as a gradient is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from embcompress.engine import GradientOptions, Program
from embcompress.engine.fused import FusedStores, UpdateRule
from embcompress.tables.plan_table import PlanTable


def fused_stores(program: Program, tables: Sequence[FusedTable]) -> FusedStores | None:
    """What the backward pass of a compiled program updates; None if that is nothing.

    Args:
        program: of the tables' plans.
        tables: by owner number.

    Raises:
        RuntimeError: within ``DistributedDataParallel``.
    """
    rule = tables[0].fused_rule
    if rule is None or not torch.is_grad_enabled():
        return None
    _check_no_replica()
    wanted: list[int] = []
    steps: list[Tensor] = []
    states: tuple[list[Tensor], list[Tensor]] = ([], [])
    for position, (owner, name) in enumerate(program.stores):
        table = tables[owner]
        names = table.updated_in_kernel.get(name)
        if names is None:
            continue
        buffers: dict[str, Any] = table._buffers
        wanted.append(position)
        steps.append(buffers[names[0]])
        for state, own in zip(states, names[1:]):  # noqa: B905  # an optimizer may have fewer
            state.append(buffers[own])
    return FusedStores(rule, wanted, *states, steps) if wanted else None


def _check_no_replica() -> None:
    """Refuse to update a replica by its own part of the batch: the replicas would drift apart."""
    replicas = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if replicas is not None and replicas.process_group.size() > 1:
        raise RuntimeError(
            "a fused optimizer updates each replica of DistributedDataParallel by its own part of "
            "the batch, and the replicas would drift apart; give the tables' parameters to an "
            "optimizer instead of calling embcompress.fuse_optimizer"
        )


class FusedTable(PlanTable):
    """The fused optimizer of a :class:`~embcompress.tables.compressed_table.CompressedTable`.

    The state of every store is in buffers ``optimizer_{store}_…`` of the module, so ``state_dict``
    and ``to()`` take it along.
    """

    fused_rule: UpdateRule | None
    updated_in_kernel: dict[str, tuple[str, ...]]

    def runs_in_kernels(self) -> bool:
        """Whether the kernels of the stores' device run the plan's head and its rows."""
        return self._program.runs_on(next(iter(self.stores().values())).device)

    @property
    def gradient_options(self) -> GradientOptions:
        """Updates in torch take sparse gradients, so that only touched rows move; those in the
        kernels take none."""
        if self.updated_in_kernel:
            return replace(self.options, sparse=False)
        is_fused = any(name.startswith("optimizer_") for name in self._buffers)
        return replace(self.options, sparse=True) if is_fused else self.options

    def fuse(self, rule: UpdateRule, states: dict[Tensor, list[Tensor]]) -> None:
        """Update the stores in the backward pass; see :func:`embcompress.fuse_optimizer`.

        Args:
            rule: how.
            states: state of the stores that were fused already; new ones are added.
        """
        self.fused_rule = rule
        floats = [store for store in self._plan.stores if store.is_float]
        is_float32 = all(store.dtype == "float32" for store in floats)
        compiled = rule.in_kernel and self._program.is_compiled and is_float32
        gathered = {name for _, name in self._program.stores}
        self.updated_in_kernel = {}
        for name, store in self.stores().items():
            known = store in states
            if not (known or store.requires_grad):  # packed, or frozen
                continue
            own = states[store] if known else states.setdefault(store, rule.new_states(store))
            names = [f"optimizer_{name}_step"]
            names += [f"optimizer_{name}_{number}" for number in range(len(own) - 1)]
            for buffer, value in zip(names, own, strict=True):
                self.register_buffer(buffer, value)
            if compiled and name in gathered:
                store.requires_grad_(False)
                self.updated_in_kernel[name] = tuple(names)
            elif not known:
                store.register_post_accumulate_grad_hook(self._updater(name))
        self._take_gradients_anew()

    def _hook_updates(self) -> None:
        """Updates in torch again: the parameters of a copy come without their hooks."""
        if self.fused_rule is None:
            return
        for name, store in self.stores().items():
            if name in self.updated_in_kernel or f"optimizer_{name}_step" not in self._buffers:
                continue
            if store._post_accumulate_grad_hooks is None:  # type: ignore[attr-defined]  # tied
                store.register_post_accumulate_grad_hook(self._updater(name))

    def unfuse(self, renewed: dict[Tensor, nn.Parameter]) -> None:
        """See :func:`embcompress.optimizers.unfuse_optimizer`.

        Args:
            renewed: the new parameter of every store that was renewed already; it is added to.
        """
        fused = [n for n in self._store_names if f"optimizer_{n}_step" in self._buffers]
        self._drop_optimizer()
        for name in fused:
            old = self.get_parameter(name)
            # A new object: hooks that update it stay with the old one.
            self.hold(name, renewed.setdefault(old, nn.Parameter(old.detach())))
        self._take_gradients_anew()

    def _take_gradients_anew(self) -> None:
        """By the options as they are now. The plan is a new object: collections notice that."""
        self._set_plan(replace(self._plan))

    def _updater(self, name: str) -> Callable[[Tensor], None]:
        """A hook that updates one store by its gradient, in torch."""

        def update(store: Tensor) -> None:
            rule, gradient = self.fused_rule, store.grad
            if rule is None:  # deployed since
                return
            assert gradient is not None
            step = self.optimizer_step(name)
            step += 1
            rule.update(store, gradient, self.optimizer_states(name), int(step))
            store.grad = None

        return update

    def optimizer_states(self, name: str) -> list[Tensor]:
        """State of one store's fused optimizer; nothing for a frozen store."""
        rule = self.fused_rule
        if rule is None or f"optimizer_{name}_step" not in self._buffers:
            return []
        return [self.optimizer_state(name, number) for number in range(rule.num_states)]

    def optimizer_state(self, name: str, number: int) -> Tensor:
        """One tensor of the state of one store's fused optimizer."""
        return cast(Tensor, self._buffers[f"optimizer_{name}_{number}"])

    def optimizer_step(self, name: str) -> Tensor:
        """(1,) int64: how often one store was updated."""
        return cast(Tensor, self._buffers[f"optimizer_{name}_step"])

    def _drop_optimizer(self) -> None:
        for name in [name for name in self._buffers if name.startswith("optimizer_")]:
            delattr(self, name)
        self.fused_rule, self.updated_in_kernel = None, {}
