"""Rows in a file, of which the most used are also in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.engine.rows import address_rows
from embcompress.layouts.slots import KEYS, WEIGHT, SlotLayout, static_keys
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Digit, LookupPlan, Probe, Slot, Store

FILE = "file_weight"
_CHUNK = 1 << 18


@register
@dataclass(frozen=True)
class Offloaded(Method):
    """The whole table in a mapped file, F[x], and rows of the frequent ids in memory, E[slot(x)].

    An id either owns a row in memory, and its row of the file is never read, or it is read from the
    file. Which ids own rows is settled at the start: the most frequent ones by the counts of the
    table; without counts some that a hash draws. They are found in a hash table of their keys. The
    budget is for what is resident, rows in memory and keys. No id shares a row with another.

    Memory: m·d numbers for m rows, and ⌈log2(n + 1)⌉ bits for every one of them (32 where ids have
    more bits: then about one id in 2**32 / ``ways`` is taken for another). In the file, beside it,
    n·d numbers (:attr:`embcompress.memory.MemoryReport.offloaded`). The pages of the file that the
    system caches take memory as long as nothing else needs it, and are not counted.

    Training: gradients are sparse in any case. A fused optimizer changes the rows in the file, and
    keeps its state for them in another file. An optimizer of torch takes those that it has a sparse
    form of (SGD, Adagrad, SparseAdam), and keeps state for all rows in memory: prefer
    :func:`embcompress.fuse_optimizer`. The table stays on the CPU.

    Copies: each module has a file of its own, also a copy and one that is unpickled. A
    ``state_dict`` has the rows; read a saved one by ``torch.load(path, mmap=True)``, so that they
    pass from file to file.

    Source: Shrestha et al., "ESPN: Memory-efficient multi-vector information retrieval", ISMM 2024
    (arXiv 2023); Yu et al., "Scaling embedding layers in language models" (SCONE), 2025; Patel et
    al., "Magnitude", EMNLP 2018, which keep vectors of documents, n-grams and words out of memory.
    What differs: the rows are trained in the file; those in memory are chosen once by counts, not
    by recent use; nothing is fetched ahead.

    Attributes:
        directory: where the file is made; None: the directory of temporary files (``TMPDIR``). One
            in memory (tmpfs) saves none. The file has no name there, and goes with the module.
        ways: slots of a bucket, ≥ 1; of few rows up to twice as many. An id whose bucket is full
            is read from the file.

    Errors: OSError where the directory does not exist or is not writable, or its disk has no room
    for the table; ValueError where the module is moved to another device than the CPU.
    """

    name: ClassVar[str] = "offloaded"
    directory: str | None = None
    ways: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.ways, int) or isinstance(self.ways, bool) or self.ways < 1:
            raise ValueError(f"ways must be an integer of at least 1, got {self.ways!r}")
        if self.directory is not None and not isinstance(self.directory, str):
            raise TypeError(f"directory must be a string or None, got {self.directory!r}")

    @property
    def file_directory(self) -> str | None:
        return self.directory

    def sizes(self, table: TableSpec) -> range:
        """Numbers of rows in memory."""
        return range(1, table.num_embeddings + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        rows, width = table.num_embeddings, table.embedding_dim
        layout = SlotLayout.without_shared(table, size, self.ways)
        own = Slot(KEYS, layout.hot, layout.bucket, layout.tag)
        # Slots lead past the rows of the file, so an id that has one reads nothing there.
        absent = Slot(KEYS, rows, layout.bucket, layout.tag, Digit(1, rows), first=rows)
        return LookupPlan(
            rows,
            width,
            stores=(
                Store(WEIGHT, layout.hot, width, table.dtype),
                layout.key_store(),
                Store(FILE, rows, width, table.dtype, location="file"),
            ),
            probes=(Probe(WEIGHT, own), Probe(FILE, absent)),
        )

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        if stores[KEYS].device.type != "meta":
            keys = static_keys(table, SlotLayout.of(plan), plan.padding_idx)
            stores[KEYS].copy_(keys)

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """The rows of the table themselves: nothing is lost.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        weight = weight.detach().cpu()
        keys = static_keys(table, SlotLayout.of(plan), plan.padding_idx)
        hot = weight.new_zeros(plan.store(WEIGHT).rows, plan.embedding_dim)
        for ids in torch.arange(table.num_embeddings).split(_CHUNK):
            rows, present = address_rows(plan.probes[0].address, ids, plan, {KEYS: keys})
            assert present is not None
            hot[rows[present]] = weight[ids[present]]
        return {WEIGHT: hot, KEYS: keys, FILE: weight}
