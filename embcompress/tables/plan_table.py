"""``PlanTable``: the stores of a plan as the parameters and buffers of a module, to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embcompress.engine import Bags, GradientOptions, Program, lookup
from embcompress.layouts.latents import fixed_steps
from embcompress.plan import LookupPlan
from embcompress.tables.store_tensors import is_latent

_DENSE_CHUNK = 1 << 16


class PlanTable(nn.Module):
    """A plan, its stores, and what reads them.

    Attributes:
        options: how gradients are taken.
    """

    options: GradientOptions
    _plan: LookupPlan
    _program: Program
    _store_names: tuple[str, ...]

    def hold(self, name: str, values: Tensor) -> None:
        """Make floats a parameter, packed numbers a buffer, of that name.

        The numbers that a packed sparse store keeps become a parameter that takes no gradient.
        """
        if name in self._parameters or name in self._buffers:
            delattr(self, name)
        if values.is_floating_point():
            if not isinstance(values, nn.Parameter):
                store = self._plan.store(name)
                is_packed = store.sparsity is not None and not is_latent(store, values)
                trained = not is_packed and name not in fixed_steps(self._plan)
                values = nn.Parameter(values, trained)
            self.register_parameter(name, values)
        else:
            self.register_buffer(name, values)

    def _set_plan(self, plan: LookupPlan) -> None:
        self._plan = plan
        self._store_names = tuple(store.name for store in plan.stores)
        self._program = Program((plan,), self.gradient_options)

    @property
    def plan(self) -> LookupPlan:
        return self._plan

    @property
    def num_embeddings(self) -> int:
        return self._plan.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self._plan.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        return self._plan.padding_idx

    @property
    def gradient_options(self) -> GradientOptions:
        """How gradients are taken now; the options, but for fused optimizers."""
        return self.options

    @property
    def sparse(self) -> bool:
        return self.options.sparse

    def stores(self) -> dict[str, Tensor]:
        """The physical tables by store name."""
        # Directly, because a module's own lookup costs a small batch more than the kernel does.
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        # A parametrized store is neither, and computed by an attribute.
        return {
            name: parameters[name]
            if name in parameters
            else buffers[name]
            if name in buffers
            else getattr(self, name)
            for name in self._store_names
        }

    def latents(self) -> tuple[str, ...]:
        """Names of the quantized and sparse stores that are held as latents, to be trained."""
        stores = self.stores()
        return tuple(s.name for s in self._plan.stores if is_latent(s, stores[s.name]))

    @torch.no_grad()
    def vectors(self, ids: Tensor) -> Tensor:
        """(N, embedding_dim) vectors of (N,) ids, without pooling or gradients."""
        plan = self._plan.with_pool("none", self._plan.padding_idx)
        return lookup(plan, self.stores(), Bags(ids, ids))

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The (num_embeddings, embedding_dim) table that the module stands for.

        The row of ``padding_idx`` is what a lookup of that id gives. For tables that fit in
        memory; it is computed in chunks.
        """
        device = next(iter(self.stores().values())).device
        ids = torch.arange(self.num_embeddings, device=device)
        return torch.cat([self.vectors(chunk) for chunk in ids.split(_DENSE_CHUNK)])


def run_plain_bags(
    program: Program,
    tables: Sequence[PlanTable],
    ids: Tensor,
    offsets: Tensor,
    ends_are_given: bool,
) -> Tensor | None:
    """See :meth:`Program.run_plain_bags`; None where the program is not plain.

    Args:
        tables: by owner number.
    """
    if not program.is_plain or torch.compiler.is_compiling() or not isinstance(ids, Tensor):
        return None
    if not program.runs_on(ids.device):
        return None
    # Not by stores(): dictionaries would cost a small batch.
    stores = []
    for owner, name in program.stores:
        table = tables[owner]
        parameters: dict[str, Any] = table._parameters
        store = parameters[name] if name in parameters else table._buffers.get(name)
        if store is None:  # parametrized
            return None
        stores.append(store)
    return program.run_plain_bags(stores, ids, offsets, ends_are_given)
