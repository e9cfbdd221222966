"""``CompressedTable``: the stores of a plan as a module, in all the forms that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from embcompress.engine import Bags, GradientOptions
from embcompress.engine.file_tensors import is_in_file, move_to_file
from embcompress.engine.fused import UpdateRule
from embcompress.initialization import initialize_stores
from embcompress.layouts.latents import pack_latents, unpack_latents
from embcompress.layouts.sparse import mask_bytes, pack_sparse, unpack_sparse
from embcompress.methods import Method, TableSpec, methods, resolve_method
from embcompress.plan import LookupPlan, PlanError, Store
from embcompress.plan.keys import with_keys_of
from embcompress.tables.fused_table import FusedTable, fused_stores
from embcompress.tables.store_tensors import (
    check_device,
    check_stores,
    dtype_name,
    empty_stores,
    is_latent,
    new_store,
)

_PLAN_KEY = "plan"


TableType = TypeVar("TableType", bound="CompressedTable")


class CompressedTable(FusedTable):
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
    each, which stands in the place of the store's index (:mod:`embcompress.layouts.sparse`).

    A store in a file is a parameter whose memory is mapped
    (:mod:`embcompress.engine.file_tensors`); it takes sparse gradients. So is the state that a
    fused optimizer has for it. Such a table stays on the CPU. Whatever gives the tensors other
    memory, as copies, unpickling, other dtypes and loading with ``assign=True`` do, ends with them
    in a new file.

    Attributes:
        plan: the :class:`~embcompress.plan.LookupPlan`, with the stores' present dtypes.
        method: name of the method that made the plan.
        settings: the method with its settings, or None where the name is no method's.
        fused_rule: the fused optimizer, or None.
        updated_in_kernel: the stores that the engine updates in its backward pass, by name: names
            of the buffers of the number of their updates, and of the optimizer's state.
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
        self.updated_in_kernel: dict[str, tuple[str, ...]] = {}
        self.start_deviation = 1.0
        self._set_plan(plan)
        for name, values in empty_stores(plan, device, deployed, self.directory).items():
            self.hold(name, values)

    def take_keys(self, plan: LookupPlan) -> None:
        """Hash from now on with the keys of a plan that differs from the module's in these alone.

        Raises:
            ValueError: it differs in more.
        """
        renewed = with_keys_of(self._plan, plan)
        if renewed is None:
            raise ValueError(f"this plan has more than other keys: {plan}\n  here: {self._plan}")
        self._set_plan(renewed)

    def _run(self, bags: Bags) -> Tensor:
        return self._program((self.stores(),), bags, fused_stores(self._program, (self,)))

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
        return self.settings is not None and self.settings.procedure_kind == "phases"

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
        check_stores(plan, stores)
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
        stores = empty_stores(plan, "cpu", directory=self.directory)
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
        latent = is_latent(store, given[store.name])
        if latent == (store.name in self.latents()):
            return {}
        return (pack_sparse if latent else unpack_sparse)(self._plan, store, given)

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

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CompressedTable:
        if self._plan.offloaded:  # before anything is moved
            check_device(self._plan, fn(torch.empty(0, device="cpu")).device)
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
            if not isinstance(saved, Tensor) or is_latent(store, saved) == is_latent(store, own):
                continue
            deployed = not is_latent(store, saved)
            if deployed and self.fused_rule is not None:
                self._drop_optimizer()
            self.hold(store.name, new_store(self._plan, store, deployed, own.device))
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
        self.take_form(plan, empty_stores(plan, device, directory=self.directory))
        return True

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, method={self.method!r}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self._plan.offloaded:
            text += f", bytes_in_files={self._plan.offloaded}"
        return f"{text}, bytes={self._plan.bytes}"


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
