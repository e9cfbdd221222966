"""``TrainingProcedure``: what methods do between optimizer steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embcompress.collection import EmbeddingBagCollection
from embcompress.memory import storage_key
from embcompress.methods import Method
from embcompress.optimizers import unfuse_optimizer
from embcompress.plan import total_bytes
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.phases import Phase, Score, TableForm, common_phases
from embcompress.tables.compressed_table import CompressedTable, tie_shared_stores
from embcompress.training.managed_table import BUFFER_PREFIX, ManagedTable
from embcompress.training.observation import Observation, observe_collection, observe_table
from embcompress.training.optimizer_state import Optimizers, as_optimizers


class TrainingProcedure:
    """What the methods of a model's tables do between optimizer steps.

    Some methods change while a model trains: rows pass from one id to another, codes are computed
    anew. Create one of these after the optimizer, and call :meth:`step` after every step of it.
    It finds the tables whose method has such work, watches the ids or gradients that the work
    goes by, and sees to it that optimizer state follows the rows. A model without such tables
    gets no hooks, and a step costs nothing.

    What is watched: calls of the tables, and of collections, in training mode and with gradients
    enabled. Under :func:`torch.compile` the graph breaks at tables that are watched.

    Methods that search or prune first train in several :attr:`phases`, at whose starts tables take
    other plans and stores. A loop that runs them serves every method::

        procedure = ec.TrainingProcedure(model)
        while (phase := procedure.begin_phase(score)) is not None:
            optimizer = torch.optim.Adagrad(model.parameters())  # the parameters are new ones
            procedure.attach(optimizer)
            ...  # phase.epochs passes, with procedure.step() after every step

    Without :meth:`begin_phase` the tables of such methods are trained in the plans that they were
    built with.

    Args:
        model: a table, a collection, or a model that contains some.
        optimizer: what trains the tables: a torch optimizer, several, or None where it is fused
            (:func:`embcompress.fuse_optimizer`), or keeps no state of rows.
        process_group: for data-parallel training, the processes that train copies of the model:
            before every step of the methods' their observations are averaged, or the first's are
            taken, so that all copies change alike. None: a process by itself.

    Attributes:
        tables: the tables with work to do, by path; see
            :class:`~embcompress.training.managed_table.ManagedTable`.
        phases: the stages in which the model is trained; one for most methods.
        phase: the present one; None before the first :meth:`begin_phase`.
        step_number: how many steps there were, in this phase where there are several.

    Raises:
        ValueError: the model has another procedure already; close that first. Or tables that are
            trained in different phases.

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
        self.phase: Phase | None = None
        self._process_group = process_group
        self._model = model
        self._all: dict[str, ManagedTable] = {}  # also those that have no work at present
        self._of_module: dict[CompressedTable, ManagedTable] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._validating = False
        self._initial: dict[str, Tensor] = {}  # what layers began with
        self._find_tables(as_optimizers(optimizer))
        self.phases = common_phases({path: t.method.phases() for path, t in self._all.items()})
        for table in self._all.values():
            if not table.module.has_phases:
                table.start(table.method.procedure())
        self._watch()

    @property
    def tables(self) -> dict[str, ManagedTable]:
        return {path: table for path, table in self._all.items() if table.procedure is not None}

    def _find_tables(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        by_storage: dict[tuple[tuple[str, int], ...], ManagedTable] = {}
        for path, module in self._model.named_modules():
            if not isinstance(module, CompressedTable) or module.settings is None:
                continue
            if not module.has_phases and module.settings.procedure() is None:
                continue
            if any(name.startswith(BUFFER_PREFIX) for name in module._buffers):
                raise ValueError(
                    f"table {path!r} has a training procedure already; call its close() first"
                )
            key = tuple(storage_key(store) for store in module.stores().values())
            if key not in by_storage:  # tables that are tied change once
                by_storage[key] = ManagedTable(module, module.settings, optimizers)
                self._all[path] = by_storage[key]
            else:
                by_storage[key].tie(module)
            self._of_module[module] = by_storage[key]

    # -- watching

    def _watch(self) -> None:
        """Put hooks on the modules through which the watched tables are read.

        In a phase in which validation examples are run, on all that read tables.
        """
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        validates = self.phase is not None and self.phase.split == "validation"
        watched = {m for m, t in self._of_module.items() if _observes(t) != "nothing"}
        for module in self._model.modules():
            if module in watched or (validates and isinstance(module, CompressedTable)):
                self._add_hook(module, observe_table)
            elif isinstance(module, EmbeddingBagCollection) and (
                validates or any(table in watched for table in module.embedding_bags.values())
            ):
                self._add_hook(module, observe_collection)

    def _add_hook(self, module: nn.Module, observer: Callable[..., Iterable[Observation]]) -> None:
        hook = _Hook(self, observer)
        self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def _take(self, observations: Iterable[Observation], output: Tensor) -> None:
        for observation in observations:
            table = self._of_module.get(observation.table)
            if table is None or table.procedure is None or _observes(table) == "nothing":
                continue
            if table.procedure.observes == "ids":
                with torch.no_grad():
                    table.procedure.observe(table, observation.ids, observation.occurrences())
            elif output.requires_grad:
                output.register_hook(_GradientHook(table, observation))

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Within it, batches are of validation examples, in a phase whose split is that.

        Procedures observe them, and nothing else learns from them: what tables give is cut off
        from their stores, and fused optimizers make no step. The gradients of layers are there
        after the backward pass; clear them.
        """
        self._validating = True
        try:
            yield
        finally:
            self._validating = False

    # -- phases

    def attach(self, optimizer: Optimizers) -> None:
        """Say what trains the tables from now on, as in the constructor."""
        for table in self._all.values():
            table.attach(as_optimizers(optimizer))

    @torch.no_grad()
    def begin_phase(self, score: Score | None = None) -> Phase | None:
        """Go over to the next phase; make optimizers anew afterwards, where there are several.

        Tables take the plans and stores that their methods give them, fused optimizers end, and
        where the phase says so layers (and tables of other methods) go back to where they began.

        Args:
            score: quality of the model as it is on validation examples, for methods that choose by
                it.

        Returns:
            The phase that begins; None after the last.

        Raises:
            ValueError: a method needs ``score``.
            RuntimeError: a method broke its promise to keep within the budget.
        """
        number = 0 if self.phase is None else self.phases.index(self.phase) + 1
        if number == len(self.phases):
            return None
        phase = self.phases[number]
        if len(self.phases) > 1:
            if number == 0 and any(each.weights == "initial" for each in self.phases):
                self._initial = {name: t.clone() for name, t in self._unmanaged().items()}
            forms = self._forms(phase, score)
            unfuse_optimizer(self._model)
            for table, form in forms.items():
                table.take(form)
            if phase.weights == "initial":
                self._restore()
            self._enter(phase)
            self._check_budget()
        self.phase = phase
        return phase

    def _phased(self) -> dict[str, ManagedTable]:
        return {path: table for path, table in self._all.items() if table.module.has_phases}

    def _forms(self, phase: Phase, score: Score | None) -> dict[ManagedTable, TableForm]:
        """What the tables of each method become."""
        groups: dict[Method, list[ManagedTable]] = {}
        for table in self._phased().values():
            groups.setdefault(table.method, []).append(table)
        return {
            table: form
            for method, tables in groups.items()
            for table, form in zip(tables, method.begin_phase(phase, tables, score), strict=True)
            if form is not None
        }

    def _unmanaged(self) -> dict[str, Tensor]:
        """Whatever belongs to no table that phases change, by name."""
        own: dict[str, Tensor] = {}
        for path, module in self._model.named_modules():
            if not isinstance(module, CompressedTable):
                own |= {f"{path}.{name}": p for name, p in module.named_parameters(recurse=False)}
                own |= {f"{path}.{name}": b for name, b in module.named_buffers(recurse=False)}
            elif not module.has_phases:
                own |= {f"{path}.{name}": store for name, store in module.stores().items()}
        return own

    def _restore(self) -> None:
        for name, tensor in self._unmanaged().items():
            tensor.copy_(self._initial[name])
        for table in self._all.values():
            if not table.module.has_phases:
                table.start(table.method.procedure())

    def _enter(
        self, phase: Phase, tensors: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Give tables whose method has phases the procedures of one, and watch what they need."""
        self.phase, self.step_number = phase, 0
        phased = self._phased()
        tie_shared_stores(module for module, t in self._of_module.items() if t in phased.values())
        for path, table in phased.items():
            procedure = table.method.phase_procedure(phase)
            table.start(procedure, None if tensors is None else tensors.get(path))
            table.hold_to_budget(phase == self.phases[-1])
        self._watch()

    def _check_budget(self) -> None:
        tables = self._phased().values()
        size, budget = (total_bytes(getattr(t, name) for t in tables) for name in ("plan", "built"))
        if self.phase == self.phases[-1] and size > budget:
            raise RuntimeError(
                f"in its last phase {self.phase.name!r} the tables take {size} bytes, but were "
                f"built for {budget}; that is an error of their methods"
            )

    # -- stepping

    @torch.no_grad()
    def step(self) -> None:
        """Do what is due; call it after the optimizer's step."""
        self.step_number += 1
        for table in self._all.values():
            procedure = table.procedure
            if procedure is not None and procedure.is_due(self.step_number):
                self._agree(table, procedure)
                procedure.step(table, self.step_number)

    def _agree(self, table: ManagedTable, procedure: TableProcedure) -> None:
        """Make the observations of all processes, or of the first, those of each."""
        group = self._process_group
        if group is not None:
            size = dist.get_world_size(group)
            for name in procedure.averaged:
                # Not ReduceOp.AVG, which gloo lacks.
                dist.all_reduce(table.tensor(name).div_(size), group=group)
            for name in procedure.from_first:
                dist.broadcast(table.tensor(name), dist.get_global_rank(group, 0), group=group)

    def close(self) -> None:
        """Remove the hooks and the procedures' tensors; the tables stay as they are."""
        for hook in self._hooks:
            hook.remove()
        for table in self._all.values():
            table.remove()
        self._hooks, self._all, self._of_module, self._initial = [], {}, {}, {}

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on, beside the state of model and optimizer; numbers and tensors."""
        tables = {
            path: {name: tensor.clone() for name, tensor in table.tensors().items()}
            for path, table in self.tables.items()
        }
        state: dict[str, Any] = {"step_number": self.step_number, "tables": tables}
        if len(self.phases) > 1 and self.phase is not None:
            state["phase"] = self.phase.name
            state["forms"] = {path: table.form_state() for path, table in self._phased().items()}
            state["initial"] = {name: tensor.clone() for name, tensor in self._initial.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier :meth:`state_dict`.

        Where there are several phases, tables take the plans that they had: load this state
        first, then make optimizers, then load theirs and the model's.

        Raises:
            ValueError: it is of other tables or phases; nothing is changed.
        """
        phase = self._saved_phase(state)
        phased = {} if phase is None else self._phased()
        saved, own = state["tables"], {p: t for p, t in self.tables.items() if p not in phased}
        if set(saved) - set(phased) != set(own) or set(state.get("forms", {})) != set(phased):
            raise ValueError(
                f"the state is of tables {sorted(saved)}, this procedure has {sorted(self._all)}"
            )
        for path, table in own.items():
            for name, tensor in table.tensors().items():
                if name not in saved[path] or saved[path][name].shape != tensor.shape:
                    raise ValueError(f"the state of table {path!r} does not fit its {name!r}")
        if phase is not None:
            unfuse_optimizer(self._model)
            for path, table in phased.items():
                table.take_state(state["forms"][path])
            self._initial = {name: tensor.clone() for name, tensor in state["initial"].items()}
            self._enter(phase, saved)
        for path, table in own.items():
            for name, tensor in table.tensors().items():
                tensor.copy_(saved[path][name])
        self.step_number = int(state["step_number"])

    def _saved_phase(self, state: Mapping[str, Any]) -> Phase | None:
        """The phase of a state; None where it was saved outside of several phases."""
        name = state.get("phase")
        for phase in self.phases:
            if phase.name == name:
                return phase
        if name is not None:
            known = [phase.name for phase in self.phases]
            raise ValueError(f"the state is of phase {name!r}, this procedure has {known}")
        return None


def _observes(table: ManagedTable) -> str:
    return "nothing" if table.procedure is None else table.procedure.observes


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
        # Not as a decorator: it imports the compiler, which takes as long as torch itself.
        self._watch = None if procedure is None else torch.compiler.disable(self._watch_call)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        return None if self._watch is None else self._watch(module, args, kwargs, output)

    def _watch_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        procedure = None if self._procedure is None else self._procedure()
        if procedure is None or self._observer is None:
            return None
        if not (module.training and torch.is_grad_enabled()):
            return None
        validates = procedure.phase is not None and procedure.phase.split == "validation"
        if validates and not procedure._validating:
            return None
        seen = output.detach().requires_grad_() if validates else output
        watched = procedure._of_module
        procedure._take(self._observer(watched, module, seen, *args, **kwargs), seen)
        return seen if validates else None

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _GradientHook:
    """A hook of a lookup's output that hands its gradient to a procedure."""

    def __init__(self, table: ManagedTable, observation: Observation) -> None:
        self.table, self.observation = table, observation

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> None:
        procedure, observation = self.table.procedure, self.observation
        if procedure is None:  # the phase is over
            return
        whole = procedure.observes == "gradients of vectors"
        amounts = (observation.gradients if whole else observation.gradient_norms)(gradient)
        procedure.observe(self.table, observation.ids, amounts)
