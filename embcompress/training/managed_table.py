"""A table that a :class:`~embcompress.TrainingProcedure` looks after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from embcompress.methods import Method, TableSpec
from embcompress.plan import LookupPlan
from embcompress.procedures.base import RowState, TableProcedure
from embcompress.procedures.phases import TableForm
from embcompress.tables.compressed_table import CompressedTable
from embcompress.training.optimizer_state import learning_rate, row_states

BUFFER_PREFIX = "training_"
#: Number of the key that start values are drawn by; those of probes are small.
_START_VALUES = 2**32 - 1


class ManagedTable:
    """A table with its procedure, as procedures and methods see it.

    Attributes:
        module: the table; the first of those that are tied.
        method: its method with its settings.
        procedure: what happens to it between steps of the present phase, or None.
        built: the plan that it was built with.
    """

    def __init__(
        self, module: CompressedTable, method: Method, optimizers: tuple[Optimizer, ...] = ()
    ) -> None:
        self.module, self.method, self.built = module, method, module.plan
        self.procedure: TableProcedure | None = None
        self._tied = [module]
        self._optimizers = optimizers
        self._names: list[str] = []

    @property
    def plan(self) -> LookupPlan:
        return self.module.plan

    @property
    def spec(self) -> TableSpec:
        spec = self.module.spec or TableSpec(self.plan.num_embeddings, self.plan.embedding_dim)
        floats = [store.dtype for store in self.plan.stores if store.is_float]
        return replace(spec, dtype=floats[0]) if floats else spec  # it may have been cast since

    def stores(self) -> dict[str, Tensor]:
        return self.module.stores()

    def new_stores(self, plan: LookupPlan) -> dict[str, Tensor]:
        return self.module.new_stores(plan, self.spec.key(_START_VALUES) >> 1)

    def row_states(self, store: str) -> list[RowState]:
        return row_states(self.module, store, self._optimizers)

    def learning_rate(self, store: str) -> float:
        return learning_rate(self.module, store, self._optimizers)

    def tensor(self, name: str) -> Tensor:
        return self.module.get_buffer(BUFFER_PREFIX + name)

    def tensors(self) -> dict[str, Tensor]:
        """All of the procedure's tensors."""
        return {name: self.tensor(name) for name in self._names}

    # -- changing

    def tie(self, module: CompressedTable) -> None:
        """Let a further module, which holds the same stores, change with the table."""
        self._tied.append(module)

    def attach(self, optimizers: tuple[Optimizer, ...]) -> None:
        """Say which optimizers train the table from now on."""
        self._optimizers = optimizers

    def start(
        self, procedure: TableProcedure | None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Have a procedure, in place of the one before, with its tensors.

        Args:
            tensors: that were saved; None: the procedure's start values.
        """
        self.remove()
        self.procedure = procedure
        if procedure is None:
            return
        device = next(iter(self.stores().values())).device
        new = procedure.new_tensors(self) if tensors is None else tensors
        for name, tensor in new.items():
            own = tensor if tensors is None else tensor.to(device, copy=True)
            self.module.register_buffer(BUFFER_PREFIX + name, own, persistent=False)
        self._names = list(new)

    def remove(self) -> None:
        """Take the procedure's tensors out of the module."""
        for name in self._names:
            delattr(self.module, BUFFER_PREFIX + name)
        self._names, self.procedure = [], None

    def take_keys(self, plan: LookupPlan) -> None:
        """Hash with the keys of a plan that differs in these alone, in all tied modules."""
        for module in self._tied:
            module.take_keys(plan)

    def take(self, form: TableForm) -> None:
        """Take another plan and stores, in all tied modules."""
        self.module.take_form(form.plan, form.stores, form.frozen)
        for other in self._tied[1:]:
            other.take_form(form.plan, self.module.stores())

    def frozen(self) -> list[str]:
        """Names of the float stores that no optimizer trains."""
        return [
            name
            for name, store in self.stores().items()
            if isinstance(store, nn.Parameter)
            and not store.requires_grad
            and name not in self.module.updated_in_kernel
        ]

    def form_state(self) -> dict[str, object]:
        """The plan and what of it is frozen: :meth:`take_state` goes back to it."""
        return {"plan": self.plan.to_json(), "frozen": self.frozen()}

    def take_state(self, state: Mapping[str, object]) -> None:
        """Take a plan of :meth:`form_state`, with stores of any values, which are loaded next."""
        plan = LookupPlan.from_json(str(state["plan"]))
        stores = {name: torch.zeros_like(t) for name, t in self.new_stores(plan).items()}
        frozen = state["frozen"]
        assert isinstance(frozen, list)
        self.take(TableForm(plan, stores, tuple(frozen)))

    def hold_to_budget(self, is_last: bool) -> None:
        """Say to :func:`embcompress.memory` whether the present plan is the one to deploy."""
        searched = not is_last and self.plan.bytes > self.built.bytes
        for module in self._tied:
            module.built_plan = self.built if searched else None
