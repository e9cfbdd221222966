"""``TrainingProcedure``: what methods do between optimizer steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embcompress.collection import EmbeddingBagCollection
from embcompress.memory import storage_key
from embcompress.modules import CompressedTable
from embcompress.observation import Observation, observe_collection, observe_table
from embcompress.optimizer_state import Optimizers, as_optimizers, learning_rate, row_states
from embcompress.plan import LookupPlan
from embcompress.procedure import RowState, TableProcedure

_BUFFER_PREFIX = "training_"


class ManagedTable:
    """A table with its procedure, as the procedure sees it.

    Attributes:
        module: the table.
        procedure: what happens to it.
    """

    def __init__(
        self, module: CompressedTable, procedure: TableProcedure, optimizers: Any = ()
    ) -> None:
        self.module, self.procedure, self._optimizers = module, procedure, optimizers
        tensors = procedure.new_tensors(self)
        self._names = list(tensors)
        for name, tensor in tensors.items():
            module.register_buffer(_BUFFER_PREFIX + name, tensor, persistent=False)

    @property
    def plan(self) -> LookupPlan:
        return self.module.plan

    def stores(self) -> dict[str, Tensor]:
        return self.module.stores()

    def row_states(self, store: str) -> list[RowState]:
        return row_states(self.module, store, self._optimizers)

    def learning_rate(self, store: str) -> float:
        return learning_rate(self.module, store, self._optimizers)

    def tensor(self, name: str) -> Tensor:
        return self.module.get_buffer(_BUFFER_PREFIX + name)

    def tensors(self) -> dict[str, Tensor]:
        """All of the procedure's tensors."""
        return {name: self.tensor(name) for name in self._names}

    def remove(self) -> None:
        """Take the procedure's tensors out of the module."""
        for name in self._names:
            delattr(self.module, _BUFFER_PREFIX + name)


class TrainingProcedure:
    """What the methods of a model's tables do between optimizer steps.

    Some methods change while a model trains: rows pass from one id to another, codes are computed
    anew. Create one of these after the optimizer, and call :meth:`step` after every step of it.
    It finds the tables whose method has such work, watches the ids or gradients that the work
    goes by, and sees to it that optimizer state follows the rows. A model without such tables
    gets no hooks, and a step costs nothing.

    What is watched: calls of the tables, and of collections, in training mode and with gradients
    enabled. Under :func:`torch.compile` the graph breaks at tables that are watched.

    Args:
        model: a table, a collection, or a model that contains some.
        optimizer: what trains the tables: a torch optimizer, several, or None where it is fused
            (:func:`embcompress.fuse_optimizer`), or keeps no state of rows.
        process_group: for data-parallel training, the processes that train copies of the model:
            before every step of the methods' their observations are averaged, so that all copies
            change alike. None: a process by itself.

    Attributes:
        tables: the tables with work to do, by path; see :class:`ManagedTable`.
        step_number: how many steps there were.

    Raises:
        ValueError: the model has another procedure already; close that first.

    Example::

        >>> import torch, embcompress as ec
        >>> table = ec.Embedding(1000, 8, method=ec.Pruned(interval=10), budget="20%")
        >>> optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
        >>> procedure = ec.TrainingProcedure(table, optimizer)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     table(torch.randint(0, 50, (64,))).square().sum().backward()
        ...     _ = optimizer.step()
        ...     procedure.step()
        >>> bool(procedure.tables[""].tensor("moves") > 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers = None,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.step_number = 0
        self.tables: dict[str, ManagedTable] = {}
        self._process_group = process_group
        self._of_module: dict[CompressedTable, ManagedTable] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._find_tables(model, as_optimizers(optimizer))
        self._watch(model)

    def _find_tables(self, model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        by_storage: dict[tuple[tuple[str, int], ...], ManagedTable] = {}
        for path, module in model.named_modules():
            if not isinstance(module, CompressedTable) or module.settings is None:
                continue
            procedure = module.settings.procedure()
            if procedure is None:
                continue
            if any(name.startswith(_BUFFER_PREFIX) for name in module._buffers):
                raise ValueError(
                    f"table {path!r} has a training procedure already; call its close() first"
                )
            key = tuple(storage_key(store) for store in module.stores().values())
            if key not in by_storage:  # tables that are tied change once
                by_storage[key] = ManagedTable(module, procedure, optimizers)
                self.tables[path] = by_storage[key]
            self._of_module[module] = by_storage[key]

    # -- watching

    def _watch(self, model: nn.Module) -> None:
        """Put hooks on the modules through which the watched tables are read."""
        watched = {m for m, t in self._of_module.items() if t.procedure.observes != "nothing"}
        for module in model.modules():
            if module in watched:
                self._add_hook(module, observe_table)
            elif isinstance(module, EmbeddingBagCollection) and any(
                table in watched for table in module.embedding_bags.values()
            ):
                self._add_hook(module, observe_collection)

    def _add_hook(self, module: nn.Module, observer: Callable[..., Iterable[Observation]]) -> None:
        hook = _Hook(self, observer)
        self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def _take(self, observations: Iterable[Observation], output: Tensor) -> None:
        for observation in observations:
            table = self._of_module.get(observation.table)
            if table is None or table.procedure.observes == "nothing":
                continue
            if table.procedure.observes == "ids":
                with torch.no_grad():
                    table.procedure.observe(table, observation.ids, observation.occurrences())
            elif output.requires_grad:
                output.register_hook(_GradientHook(table, observation))

    # -- stepping

    @torch.no_grad()
    def step(self) -> None:
        """Do what is due; call it after the optimizer's step."""
        self.step_number += 1
        for table in self.tables.values():
            if table.procedure.is_due(self.step_number):
                self._average(table)
                table.procedure.step(table, self.step_number)

    def _average(self, table: ManagedTable) -> None:
        """Make the observations of all processes those of each."""
        if self._process_group is not None:
            size = dist.get_world_size(self._process_group)
            for name in table.procedure.averaged:
                # Not ReduceOp.AVG, which gloo lacks.
                dist.all_reduce(table.tensor(name).div_(size), group=self._process_group)

    def close(self) -> None:
        """Remove the hooks and the procedures' tensors; the tables stay as they are."""
        for hook in self._hooks:
            hook.remove()
        for table in self.tables.values():
            table.remove()
        self._hooks, self.tables, self._of_module = [], {}, {}

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on, beside the state of model and optimizer; numbers and tensors."""
        tables = {
            path: {name: tensor.clone() for name, tensor in table.tensors().items()}
            for path, table in self.tables.items()
        }
        return {"step_number": self.step_number, "tables": tables}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier :meth:`state_dict`.

        Raises:
            ValueError: it is of other tables; nothing is changed.
        """
        saved = state["tables"]
        if set(saved) != set(self.tables):
            raise ValueError(
                f"the state is of tables {sorted(saved)}, this procedure has {sorted(self.tables)}"
            )
        for path, table in self.tables.items():
            for name, tensor in table.tensors().items():
                if name not in saved[path] or saved[path][name].shape != tensor.shape:
                    raise ValueError(f"the state of table {path!r} does not fit its {name!r}")
        for path, table in self.tables.items():
            for name, tensor in table.tensors().items():
                tensor.copy_(saved[path][name])
        self.step_number = int(state["step_number"])


class _Hook:
    """A forward hook that hands what a module was called with to a procedure.

    In a copy of the module, and when it is read back from a pickle, it does nothing.
    """

    def __init__(
        self,
        procedure: TrainingProcedure | None = None,
        observer: Callable[..., Iterable[Observation]] | None = None,
    ) -> None:
        self._procedure = None if procedure is None else weakref.ref(procedure)
        self._observer = observer

    @torch.compiler.disable
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        procedure = None if self._procedure is None else self._procedure()
        if procedure is None or self._observer is None:
            return
        if module.training and torch.is_grad_enabled():
            watched = procedure._of_module
            procedure._take(self._observer(watched, module, output, *args, **kwargs), output)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _GradientHook:
    """A hook of a lookup's output that hands its gradient to a procedure."""

    def __init__(self, table: ManagedTable, observation: Observation) -> None:
        self.table, self.observation = table, observation

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> None:
        procedure, observation = self.table.procedure, self.observation
        whole = procedure.observes == "gradients of vectors"
        amounts = (observation.gradients if whole else observation.gradient_norms)(gradient)
        procedure.observe(self.table, observation.ids, amounts)
