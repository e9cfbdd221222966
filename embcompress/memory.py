"""What tables cost, read off their storages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from embcompress.budget import format_bytes
from embcompress.engine.encoding import record_bytes
from embcompress.engine.file_tensors import is_in_file
from embcompress.plan import LookupPlan
from embcompress.tables.compressed_table import CompressedTable
from embcompress.text_table import text_table

DENSE_MODULES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class HeldTable:
    """A table whose stores are in modules of another kind.

    Attributes:
        name: of the table.
        method: name of its method.
        plan: that it is looked up by.
        tensors: those that hold its stores, by store name; they may be larger than these.
    """

    name: str
    method: str
    plan: LookupPlan
    tensors: dict[str, Tensor]


class HoldsTables(nn.Module):
    """A module that stands for tables, whatever modules inside of it their rows are in."""

    @abstractmethod
    def held_tables(self) -> Iterator[HeldTable]:
        """Every table."""


@dataclass(frozen=True)
class TableMemory:
    """One table of a model.

    Attributes:
        name: path of its module; further paths of a shared module in ``also``.
        rows, width: shape of the dense table.
        method: name of its method (``"full"`` for torch's modules).
        bytes: resident bytes at lookup, once the table is deployed (one that TorchRec holds, once
            it is lifted and deployed); storages that an earlier table counted already add nothing.
        dense: bytes of the float32 table.
        training: further bytes that the module holds for training: what the float latents of
            packed or sparse rows and the structures of a search take beyond these, and optimizer
            state.
        also: other paths that lead to the same module.
        offloaded: bytes in files, which are not resident, of rows and of optimizer state.
        plan_bytes: of the table's plan as the engine reads it, sizes and hash keys, on top of
            ``bytes`` (0: torch's modules, which have none).
    """

    name: str
    rows: int
    width: int
    method: str
    bytes: int
    dense: int
    training: int = 0
    also: tuple[str, ...] = ()
    offloaded: int = 0
    plan_bytes: int = 0


@dataclass(frozen=True)
class MemoryReport:
    """The tables of a model and their bytes; prints as a table.

    Bytes of plans are printed where they are more than a hundredth of the tables'.
    """

    tables: tuple[TableMemory, ...] = field(default_factory=tuple)

    @property
    def total(self) -> int:
        """Bytes resident at lookup time, each storage once."""
        return sum(table.bytes for table in self.tables)

    @property
    def dense(self) -> int:
        """Bytes of the float32 tables that they stand for."""
        return sum(table.dense for table in self.tables)

    @property
    def ratio(self) -> float:
        """``total / dense`` (1.0 where there are no tables)."""
        return self.total / self.dense if self.dense else 1.0

    @property
    def training(self) -> int:
        """Bytes held for training on top of ``total``."""
        return sum(table.training for table in self.tables)

    @property
    def offloaded(self) -> int:
        """Bytes in files, beside ``total``."""
        return sum(table.offloaded for table in self.tables)

    @property
    def plan_bytes(self) -> int:
        """Bytes of the plans that the engine reads, on top of ``total``."""
        return sum(table.plan_bytes for table in self.tables)

    def __str__(self) -> str:
        beside = {"in files": self.offloaded > 0, "plan": 100 * self.plan_bytes > self.total}

        def sizes(of: TableMemory | MemoryReport, size: int) -> list[str]:
            extra = {"in files": of.offloaded, "plan": of.plan_bytes}
            shown = [of.dense, size, *(extra[name] for name in beside if beside[name])]
            return [format_bytes(each) for each in shown]

        rows = [(t.name, t.rows, t.width, t.method, *sizes(t, t.bytes)) for t in self.tables]
        total = ("total", "", "", f"{self.ratio:.4%}", *sizes(self, self.total))
        columns = [name for name in beside if beside[name]]
        return text_table(
            ("table", "rows", "width", "method", "dense", "bytes", *columns), [*rows, total]
        )


def memory(module: nn.Module) -> MemoryReport:
    """Memory of every embedding table in a module, torch's own and ours.

    Args:
        module: any module; a table counts once however many paths lead to it, and tables that
            share a storage count its bytes once.
    """
    paths: dict[nn.Module, list[str]] = {}
    inner: set[nn.Module] = set()
    for path, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, (HoldsTables, CompressedTable, *DENSE_MODULES)):
            paths.setdefault(child, []).append(path)
        if isinstance(child, HoldsTables):
            inner.update(each for each in child.modules() if each is not child)
    counted: set[tuple[str, int]] = set()
    tables: list[TableMemory] = []
    for child, names in paths.items():
        if child in inner:  # it holds rows of tables, and is none
            continue
        if isinstance(child, HoldsTables):
            tables += [_held_memory(each, names, counted) for each in child.held_tables()]
        else:
            assert isinstance(child, (CompressedTable, *DENSE_MODULES))
            tables.append(_module_memory(child, names, counted))
    return MemoryReport(tuple(tables))


def _module_memory(
    module: CompressedTable | nn.Embedding | nn.EmbeddingBag,
    paths: list[str],
    counted: set[tuple[str, int]],
) -> TableMemory:
    tensors = [*module.parameters(), *module.buffers()]
    offloaded = _new_bytes([tensor for tensor in tensors if is_in_file(tensor)], counted)
    if isinstance(module, CompressedTable):
        size, latents = _table_bytes(module, counted)
        if module.spec is not None:  # what phases will ask for
            known = (module.spec.counts, module.spec.co_occurrence)
            latents += _new_bytes([tensor for tensor in known if tensor is not None], counted)
        method, plan_bytes = module.method, record_bytes(module.built_plan or module.plan)
    else:
        size, latents, method, plan_bytes = _new_bytes([module.weight], counted), 0, "full", 0
    training = latents + _new_bytes(tensors, counted)
    rows, width = module.num_embeddings, module.embedding_dim
    name, *also = paths
    return TableMemory(
        name, rows, width, method, size, rows * width * 4, training, tuple(also), offloaded,
        plan_bytes,
    )  # fmt: skip


def _held_memory(table: HeldTable, paths: list[str], counted: set[tuple[str, int]]) -> TableMemory:
    """Of a store, what the plan says; what the tensor that holds it takes beyond is training."""
    deployed = training = 0
    for store in table.plan.stores:
        held = _new_bytes([table.tensors[store.name]], counted)
        deployed += min(held, store.bytes)
        training += max(0, held - store.bytes)
    rows, width = table.plan.num_embeddings, table.plan.embedding_dim
    name, *also = (f"{path}.{table.name}" for path in paths)
    return TableMemory(
        name, rows, width, table.method, deployed, rows * width * 4, training, tuple(also),
        plan_bytes=record_bytes(table.plan),
    )  # fmt: skip


def _table_bytes(table: CompressedTable, counted: set[tuple[str, int]]) -> tuple[int, int]:
    """Bytes that the deployed plan takes, and what latents take beyond their packed form."""
    deployed = training = 0
    unpacked = set(table.latents())
    sparsities = [table.plan.store(name).sparsity for name in unpacked]
    unpacked |= {sparsity.index for sparsity in sparsities if sparsity is not None}
    for store in table.plan.stores:
        size = _new_bytes([table.stores()[store.name]], counted)
        packed = store.bytes if store.name in unpacked and size else size
        deployed += packed
        training += max(0, size - packed)
    if table.built_plan is not None:  # what is searched in is not deployed
        searched = deployed
        deployed = min(searched, table.built_plan.bytes)
        training += searched - deployed
    return deployed, training


def _new_bytes(tensors: list[Tensor], counted: set[tuple[str, int]]) -> int:
    """Bytes of the storages that are not in ``counted`` yet; they are added to it."""
    size = 0
    for tensor in tensors:
        key = storage_key(tensor)
        if key not in counted:
            counted.add(key)
            size += tensor.untyped_storage().nbytes()
    return size


def storage_key(tensor: Tensor) -> tuple[str, int]:
    """Identifies the storage of a tensor; equal for tensors that share it."""
    if tensor.device.type == "meta":  # no storage: the tensor itself
        return "meta", id(tensor)
    return str(tensor.device), tensor.untyped_storage().data_ptr()
