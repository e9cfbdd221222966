"""``CompressedTable``: the stores of a plan as a module, in all the forms that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from embcompress.engine import Bags, GradientOptions, Program, lookup
from embcompress.engine.fused import FusedStores, UpdateRule
from embcompress.file_tensors import file_tensor, is_in_file, move_to_file
from embcompress.initialization import initialize_stores
from embcompress.latents import fixed_steps, pack_latents, unpack_latents
from embcompress.methods import Method, TableSpec, methods, resolve_method
from embcompress.plan import LookupPlan, PlanError, Store
from embcompress.plan_keys import with_keys_of
from embcompress.sparse_layout import even_mask, mask_bytes, pack_sparse, unpack_sparse

_PLAN_KEY = "plan"
_DENSE_CHUNK = 1 << 16


def fused_stores(program: Program, tables: Sequence[CompressedTable]) -> FusedStores | None:
    """What the backward pass of a compiled program updates; None if that is nothing.

    Args:
        program: of the tables' plans.
        tables: by owner number.
    """
    rule = tables[0].fused_rule
    if rule is None or not torch.is_grad_enabled():
        return None
    wanted: list[int] = []
    steps: list[Tensor] = []
    states: list[list[Tensor]] = [[] for _ in range(2)]
    num_states = rule.num_states
    for position, (owner, name) in enumerate(program.stores):
        table = tables[owner]
        if name in table.updated_in_kernel:
            wanted.append(position)
            steps.append(table.optimizer_step(name))
            for number in range(num_states):
                states[number].append(table.optimizer_state(name, number))
    if not wanted:
        return None
    first, second = states
    return FusedStores(rule, wanted, first, second, steps)


TableType = TypeVar("TableType", bound="CompressedTable")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


class CompressedTable(nn.Module):
    """What :class:`Embedding` and :class:`EmbeddingBag` share: a plan and its stores.

    Every store of the plan is a parameter of the module under the store's name; tables of codes
    are uint8 buffers. ``state_dict`` carries the plan of a compressed table beside them, so that
    weights are never read through other hash keys than they were trained with.

    A quantized store is held as float latents, a (rows, width) parameter, while it is trained:
    lookups read them rounded to its codes (:mod:`embcompress.engine.quantization`).
    :func:`embcompress.deploy` replaces them by the packed codes, a uint8 buffer of the plan's
    bytes. A ``state_dict`` of either form loads into a module of either: the module takes the
    form of what it loads. Steps that are not to be trained do not require gradients.

    A sparse store is trained as dense latents, too. Lookups read them through a mask, a bit for
    each, which stands in the place of the store's index (:mod:`embcompress.sparse_layout`).

    A store in a file is a parameter whose memory is mapped (:mod:`embcompress.file_tensors`); it
    takes sparse gradients. So is the state that a fused optimizer has for it. Such a table stays on
    the CPU. Whatever gives the tensors other memory, as copies, unpickling, other dtypes and
    loading with ``assign=True`` do, ends with them in a new file.

    Attributes:
        plan: the :class:`~embcompress.plan.LookupPlan`, with the stores' present dtypes.
        method: name of the method that made the plan.
        settings: the method with its settings, or None where the name is no method's.
        fused_rule: the fused optimizer, or None.
        updated_in_kernel: names of the stores that the engine updates in its backward pass.
        start_deviation: standard deviation of the vectors that :meth:`reset_parameters` gives.
        spec: what the plan was made for, where the method has several phases; else None.
        built_plan: the plan under the budget, while a phase has put another in its place that is
            not deployed; else None.
    """

    def __init__(
        self,
        plan: LookupPlan,
        method: str | Method,
        options: GradientOptions,
        *,
        deployed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.set_method(method)
        self.spec: TableSpec | None = None
        self.table_name = ""
        self.built_plan: LookupPlan | None = None
        self.options = options
        self.fused_rule: UpdateRule | None = None
        self.updated_in_kernel: tuple[str, ...] = ()
        self.start_deviation = 1.0
        self._set_plan(plan)
        for name, values in _empty_stores(plan, device, deployed, self.directory).items():
            self.hold(name, values)

    def hold(self, name: str, values: Tensor) -> None:
        """Make floats a parameter, packed numbers a buffer, of that name.

        The numbers that a packed sparse store keeps become a parameter that takes no gradient.
        """
        if name in self._parameters or name in self._buffers:
            delattr(self, name)
        if values.is_floating_point():
            if not isinstance(values, nn.Parameter):
                store = self._plan.store(name)
                is_packed = store.sparsity is not None and not _is_latent(store, values)
                trained = not is_packed and name not in fixed_steps(self._plan)
                values = nn.Parameter(values, trained)
            self.register_parameter(name, values)
        else:
            self.register_buffer(name, values)

    def _set_plan(self, plan: LookupPlan) -> None:
        self._plan = plan
        self._store_names = tuple(store.name for store in plan.stores)
        self._program = Program((plan,), self.options)

    def take_keys(self, plan: LookupPlan) -> None:
        """Hash from now on with the keys of a plan that differs from the module's in these alone.

        Raises:
            ValueError: it differs in more.
        """
        renewed = with_keys_of(self._plan, plan)
        if renewed is None:
            raise ValueError(f"this plan has more than other keys: {plan}\n  here: {self._plan}")
        self._set_plan(renewed)

    # -- reading

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
        return tuple(s.name for s in self._plan.stores if _is_latent(s, stores[s.name]))

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

    def _run(self, bags: Bags) -> Tensor:
        fused = fused_stores(self._program, (self,)) if self.updated_in_kernel else None
        return self._program((self.stores(),), bags, fused)

    def _run_plain_bags(self, ids: Tensor, offsets: Tensor, ends_are_given: bool) -> Tensor | None:
        """See :meth:`Program.run_plain_bags`."""
        parameters, buffers = self._parameters, self._buffers
        stores = []
        for name in self._store_names:
            store = parameters[name] if name in parameters else buffers.get(name)
            if store is None:  # parametrized
                return None
            stores.append(store)
        return self._program.run_plain_bags(stores, ids, offsets, ends_are_given)

    @property
    def directory(self) -> str | None:
        """Where the files of stores are made; None: the directory of temporary files."""
        return None if self.settings is None else self.settings.file_directory

    # -- changing

    def set_method(self, method: str | Method) -> None:
        """Say which method made the plan; a name stands for the method's default settings."""
        self.method = method if isinstance(method, str) else method.name
        known = not isinstance(method, str) or method in methods()
        self.settings = resolve_method(method) if known else None

    @property
    def has_phases(self) -> bool:
        """Whether the method trains in several phases, and may change the plan in between."""
        return self.settings is not None and len(self.settings.phases()) > 1

    def keep_spec(self, spec: TableSpec) -> None:
        """Remember the table's name; and all else, if the phases of the method will ask for it."""
        self.table_name = spec.name
        if self.has_phases:
            self.spec = spec

    def take_form(
        self, plan: LookupPlan, stores: Mapping[str, Tensor], frozen: Sequence[str] = ()
    ) -> None:
        """Take another plan and stores in place of all that was here, also the optimizer.

        Args:
            plan: its pooling and padding id stay those of the module.
            stores: a tensor for every store: floats become parameters (as they are, where they
                are parameters already), the others buffers.
            frozen: stores that need no gradient.

        Raises:
            ValueError: stores that are not the plan's, or of another shape.
        """
        _check_stores(plan, stores)
        self._drop_optimizer()
        for name in self._store_names:
            delattr(self, name)
        self._set_plan(plan.with_pool(self._plan.pool, self._plan.padding_idx))
        for store in plan.stores:
            self.hold(store.name, stores[store.name])
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw all stores anew, so that the vectors have mean 0 and this standard deviation.

        Random numbers come from torch's global generator. A full table is drawn as torch does.

        Args:
            std: None: the deviation of the last call, 1 before there was one.
        """
        if std is not None:
            self.start_deviation = std
        initialize_stores(self._plan, self.stores(), self.start_deviation)
        if self._plan.is_dense and self.padding_idx is not None:
            with torch.no_grad():
                self.stores()[self._plan.stores[0].name][self.padding_idx].zero_()

    def new_stores(self, plan: LookupPlan, seed: int) -> dict[str, Tensor]:
        """Stores at the start values that a seed gives this module's vectors; codes zero.

        Random numbers are drawn on the CPU, so they are the same on every device.
        """
        stores = _empty_stores(plan, "cpu", directory=self.directory)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            initialize_stores(plan, stores, self.start_deviation)
        device = next(iter(self.stores().values())).device
        return {name: tensor.to(device) for name, tensor in stores.items()}

    def adopt_stores(self: TableType, stores: Mapping[str, Tensor]) -> TableType:
        """Hold these tensors as the stores of those names, sharing their memory.

        Args:
            stores: float tensors of the stores' shapes, which become parameters.

        Raises:
            ValueError: a shape that is not the plan's.
        """
        for name, tensor in stores.items():
            store = self._plan.store(name)
            if tuple(tensor.shape) != store.shape:
                raise ValueError(
                    f"store {name!r} has shape {tuple(tensor.shape)}, the plan says {store.shape}"
                )
            setattr(self, name, nn.Parameter(tensor))
        return self

    def replace_stores(self, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        """Take another plan and its stores, in place; see :func:`replace_rows`.

        Float stores become new parameters, so optimizers must be told. State of a fused
        optimizer starts anew, but for the numbers of steps.
        """
        learned = {
            name: store.requires_grad or name in self.updated_in_kernel
            for name, store in self.stores().items()
        }
        steps = {
            name: getattr(self, step)
            for name in learned
            if (step := f"optimizer_{name}_step") in self._buffers
        }
        for name in [*self.stores(), *(b for b in self._buffers if b.startswith("optimizer_"))]:
            delattr(self, name)
        self._set_plan(plan)
        for name, tensor in stores.items():
            if tensor.is_floating_point():
                trained = learned.get(name, any(learned.values()))
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))
            else:
                self.register_buffer(name, tensor)
        if self.fused_rule is not None:
            self.fuse(self.fused_rule, {})
            for name, step in steps.items():
                if f"optimizer_{name}_step" in self._buffers:
                    self.optimizer_step(name).copy_(step)

    @torch.no_grad()
    def load_stores(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into stores, such as those of :meth:`embcompress.Method.fit`.

        Args:
            values: by store name, of the store's shape. A quantized store takes float latents or
                packed codes, whichever form it has here: codes become the latents that read as
                them, and latents are packed. Its scale and bias are copied first. So does a sparse
                store, with the mask of its latents, or the index and starts of its numbers.

        Raises:
            ValueError: a name that is no store, or another shape.
        """
        for store in self._plan.stores:
            if store.sparsity is not None and store.name in values:
                values = {**values, **self._in_own_form(store, values)}
        quantized = {s.name: s for s in self._plan.stores if s.quantization is not None}
        # Scales and biases first: the latents of codes follow from them.
        for name in sorted(values, key=lambda name: name in quantized):
            own, new = self._plan.store(name), values[name]
            if name in quantized and new.is_floating_point() != (name in self.latents()):
                convert = pack_latents if new.is_floating_point() else unpack_latents
                new = convert(self._plan, own, {**self.stores(), name: new})
            target = self.stores()[name]
            if new.shape != target.shape:
                raise ValueError(
                    f"store {name!r} has shape {tuple(target.shape)}, got {tuple(new.shape)}"
                )
            target.copy_(new)

    def _in_own_form(self, store: Store, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A sparse store's values in the form in which it is held, where they are in the other."""
        given = {**self.stores(), **values}
        is_latent = _is_latent(store, given[store.name])
        if is_latent == (store.name in self.latents()):
            return {}
        return (pack_sparse if is_latent else unpack_sparse)(self._plan, store, given)

    def fit_(
        self: TableType,
        weight: Tensor,
        seed: int = 0,
        name: str = "",
        counts: Tensor | None = None,
    ) -> TableType:
        """Approximate a trained table, in place; see :meth:`embcompress.Method.fit`.

        Args:
            weight: (num_embeddings, embedding_dim) float.
            seed, name, counts: that the module was made with.

        Raises:
            ValueError: another shape, or a method that cannot start from a trained table.
        """
        expected = (self.num_embeddings, self.embedding_dim)
        if tuple(weight.shape) != expected:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {expected}")
        if self.settings is None:
            raise ValueError(f"{self.method!r} is no method, so nothing says how to fit its plan")
        table = TableSpec(*expected, name, seed, dtype_name(weight.dtype), counts)
        self.load_stores(self.settings.fit(table, self._plan, weight))
        return self

    def hold_packed(self, packed: Mapping[str, Tensor]) -> None:
        """Replace latents by their packed form, and end the training of a fused optimizer.

        Args:
            packed: by store name, what :func:`embcompress.deploy` made of :meth:`latents`.
        """
        if self.fused_rule is not None:
            self._drop_optimizer()
        for name, tensor in packed.items():
            self.hold(name, tensor)

    def _drop_optimizer(self) -> None:
        for name in [name for name in self._buffers if name.startswith("optimizer_")]:
            delattr(self, name)
        self.fused_rule, self.updated_in_kernel = None, ()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CompressedTable:
        if self._plan.offloaded:  # before anything is moved
            _check_device(self._plan, fn(torch.empty(0, device="cpu")).device)
        super()._apply(fn, recurse)
        self._return_to_files()
        floats = {s.name: getattr(self, s.name) for s in self._plan.stores if s.is_float}
        plan = self._plan.with_dtypes({n: dtype_name(t.dtype) for n, t in floats.items()})
        if plan is not self._plan:
            self._set_plan(plan)
        return self

    # -- files

    def _return_to_files(self) -> None:
        """Put what should be in files and is in memory into new ones; objects stay the same."""
        for store in self._plan.stores:
            if not store.is_in_file:
                continue
            tensors = [self._parameters.get(store.name), *self.optimizer_states(store.name)]
            for tensor in tensors:
                if tensor is not None and tensor.device.type == "cpu" and not is_in_file(tensor):
                    move_to_file(tensor, self.directory)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, whose tensors are in memory."""
        super().__setstate__(state)
        self._return_to_files()
        self._hook_updates()

    # -- fused optimizers

    def runs_in_kernels(self) -> bool:
        """Whether the kernels of the stores' device run the plan's head and its rows."""
        return self._program.runs_on(next(iter(self.stores().values())).device)

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
        if not compiled:
            self.options = replace(self.options, sparse=True)
            self._set_plan(replace(self._plan))  # a new object: collections notice the change
        gathered = {name for _, name in self._program.stores}
        in_kernel = []
        for name, store in self.stores().items():
            known = store in states
            if not (known or store.requires_grad):  # packed, or frozen
                continue
            own = states[store] if known else states.setdefault(store, rule.new_states(store))
            step, *values = own
            self.register_buffer(f"optimizer_{name}_step", step)
            for number, state in enumerate(values):
                self.register_buffer(f"optimizer_{name}_{number}", state)
            if compiled and name in gathered:
                store.requires_grad_(False)
                in_kernel.append(name)
            elif not known:
                store.register_post_accumulate_grad_hook(self._updater(name))
        self.updated_in_kernel = tuple(in_kernel)

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

    # -- state

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._plan.is_dense or self.has_phases:
            encoded = bytearray(self._plan.to_json().encode())
            destination[prefix + _PLAN_KEY] = torch.frombuffer(encoded, dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + _PLAN_KEY
        saved = state_dict.pop(key, None)
        if saved is not None:
            error = self._plan_mismatch(saved)
            if error and not self._take_searched_plan(saved):
                error_msgs.append(f"{key}: {error}")
        elif not self._plan.is_dense:
            missing_keys.append(key)
        self._take_form_of(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._return_to_files()

    def _take_form_of(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Hold quantized and sparse stores as weights to be loaded do: as latents, or packed."""
        for store in self._plan.stores:
            own, saved = self.stores()[store.name], state_dict.get(prefix + store.name)
            if not isinstance(saved, Tensor) or _is_latent(store, saved) == _is_latent(store, own):
                continue
            deployed = not _is_latent(store, saved)
            if deployed and self.fused_rule is not None:
                self._drop_optimizer()
            self.hold(store.name, _new_store(self._plan, store, deployed, own.device))
            if store.sparsity is not None:
                index = self._plan.store(store.sparsity.index)
                size = index.bytes if deployed else mask_bytes(store)
                self.hold(index.name, torch.zeros(size, dtype=torch.uint8, device=own.device))

    def _plan_mismatch(self, saved: Tensor) -> str | None:
        try:
            plan = LookupPlan.from_json(bytes(saved.cpu().numpy()).decode())
        except (PlanError, UnicodeDecodeError) as error:
            return f"the saved plan cannot be read: {error}"
        if _addressing(plan) == _addressing(self._plan):
            return None
        if self.settings is not None and self.settings.renews_keys:
            renewed = with_keys_of(self._plan, plan)
            if renewed is not None and _addressing(renewed) == _addressing(plan):
                self._set_plan(renewed)
                return None
        return (
            f"the saved weights belong to another plan:\n  saved: {plan}\n  here:  {self._plan}\n"
            "create the module with the same method, budget, seed and name"
        )

    def _take_searched_plan(self, saved: Tensor) -> bool:
        """Take the plan of the weights to be loaded, if it is the outcome of phases.

        Not where an optimizer is fused, whose state would have to change with it.
        """
        if self.settings is None or not self.settings.searches_plans:
            return False
        if self.fused_rule is not None:
            return False
        plan = LookupPlan.from_json(bytes(saved.cpu().numpy()).decode())
        shape = (plan.num_embeddings, plan.embedding_dim)
        if shape != (self.num_embeddings, self.embedding_dim):
            return False
        device = next(iter(self.stores().values())).device
        self.take_form(plan, _empty_stores(plan, device, directory=self.directory))
        return True

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, method={self.method!r}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self._plan.offloaded:
            text += f", bytes_in_files={self._plan.offloaded}"
        return f"{text}, bytes={self._plan.bytes}"


def _is_latent(store: Store, values: Tensor) -> bool:
    """Whether a quantized or sparse store is held in the form that is trained."""
    if store.sparsity is not None:
        return values.dim() == 2
    return store.quantization is not None and values.is_floating_point()


def _check_device(plan: LookupPlan, device: torch.device) -> None:
    """Refuse to put rows that are in a file on a device whose kernels cannot read them."""
    if device.type not in ("cpu", "meta"):
        names = [store.name for store in plan.stores if store.is_in_file]
        raise ValueError(
            f"stores {names} are in files, which the CPU reads, and cannot be on device "
            f"{str(device)!r}; leave this table on the CPU, or choose another method"
        )


def _new_store(
    plan: LookupPlan,
    store: Store,
    deployed: bool,
    device: torch.device | str | None,
    directory: str | None = None,
) -> Tensor:
    """An uninitialized tensor for a store, in the form that is trained or the deployed one."""
    if store.is_in_file:
        own = torch.get_default_device() if device is None else torch.device(device)
        if own.type == "cpu":
            return file_tensor(store.shape, _training_dtype(plan, store), directory)
    if store.is_float or (store.quantization is not None and not deployed):
        shape: tuple[int, ...] = store.shape
        if store.sparsity is not None and deployed:
            shape = (store.sparsity.stored,)
        return torch.empty(shape, device=device, dtype=_training_dtype(plan, store))
    return torch.zeros(store.bytes, device=device, dtype=torch.uint8)


def _training_dtype(plan: LookupPlan, store: Store) -> torch.dtype:
    """The dtype in which a store of values is trained: latents are at least float32."""
    if store.quantization is None:
        return cast(torch.dtype, getattr(torch, store.dtype))
    scale = plan.store(store.quantization.scale)
    return torch.promote_types(torch.float32, getattr(torch, scale.dtype))


def _empty_stores(
    plan: LookupPlan,
    device: torch.device | str | None,
    deployed: bool = False,
    directory: str | None = None,
) -> dict[str, Tensor]:
    """Tensors for the stores of a plan: floats of any value, codes that are zero.

    Masks of latents keep as many numbers as the plan.

    Raises:
        ValueError: a store in a file, for another device than the CPU.
        OSError: the file cannot be made (:func:`embcompress.file_tensors.file_tensor`).
    """
    if plan.offloaded:
        own = torch.get_default_device() if device is None else torch.device(device)
        _check_device(plan, own)
    stores = {
        store.name: _new_store(plan, store, deployed, device, directory) for store in plan.stores
    }
    for store in plan.stores:
        if store.sparsity is not None and not deployed:
            stores[store.sparsity.index] = even_mask(store, device)
    return stores


def _check_stores(plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
    names = [store.name for store in plan.stores]
    if set(stores) != set(names):
        raise ValueError(f"the plan has stores {sorted(names)}, got {sorted(stores)}")
    masks = {s.sparsity.index: mask_bytes(s) for s in plan.stores if s.sparsity is not None}
    for store in plan.stores:
        tensor, size = stores[store.name], masks.get(store.name, store.bytes)
        shape = store.shape if tensor.is_floating_point() else (size,)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"store {store.name!r} has shape {tuple(tensor.shape)}, the plan says {shape}"
            )


def _addressing(plan: LookupPlan) -> LookupPlan:
    """The plan without what may differ between the modules that share weights."""
    floats = {store.name: "float32" for store in plan.stores if store.is_float}
    return plan.with_pool("none").with_dtypes(floats)


def tie_shared_stores(tables: Iterable[CompressedTable]) -> None:
    """Let tables whose plans share stores hold the same tensors, those of the first of them.

    Raises:
        ValueError: shared stores of different shapes: the tables were not sized together.
    """
    known: dict[str, Tensor] = {}
    for table in tables:
        for store in table.plan.stores:
            if not store.shared:
                continue
            own = getattr(table, store.name)
            first = known.setdefault(store.shared, own)
            if first.shape != own.shape:
                raise ValueError(
                    f"tables share {store.shared!r}, one with {tuple(first.shape)}, another with "
                    f"{tuple(own.shape)} numbers"
                )
            setattr(table, store.name, first)


# --------------------------------------------------------------------------------- constructors
