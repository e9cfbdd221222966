"""Inference through FBGEMM's table-batched lookup of quantized rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcompress.collection import EmbeddingBagCollection
from embcompress.engine import Bags, make_bags
from embcompress.layouts.packing import pack_codes, unpack_codes
from embcompress.lowering.readers import Jagged, PooledReader
from embcompress.lowering.tables import is_summed, pooled_reads
from embcompress.memory import storage_key
from embcompress.modules import EmbeddingBag
from embcompress.plan import LookupPlan, Sign, Store

_FLOATS = {"float32": "FP32", "float16": "FP16"}
_CHUNK_ROWS = 1 << 16
_BITS = {8: "INT8", 4: "INT4", 2: "INT2"}


@dataclass(frozen=True)
class _Table:
    """One table of FBGEMM's.

    Attributes:
        kind: name of FBGEMM's ``SparseType``.
        columns: width, with padding to whole bytes.
        rows: (rows, bytes) uint8.
        parameters: (rows, 4) uint8, a float16 scale and bias for each row; None for floats.
    """

    kind: str
    columns: int
    rows: Tensor
    parameters: Tensor | None


class BatchedLookup(nn.Module):
    """Pooled lookups of compressed tables by one call of FBGEMM's quantized kernel.

    For inference; the values are those of the tables when this was made. Ids become rows in torch
    and rows are pooled by FBGEMM: floats as they are, codes of 8, 4 and 2 bits packed (1 bit
    becomes 2). Scales that all rows share are applied to the pooled codes, so nothing is rounded;
    scales by row go to FBGEMM, which keeps them in float16.

    It takes plans whose bags are sums of rows: no products, learned weights or maxima. On a CPU
    this library's own engine needs no second copy of the rows; measure before you choose.

    Args:
        module: an :class:`~embcompress.EmbeddingBag` or
            :class:`~embcompress.EmbeddingBagCollection`, deployed (:func:`embcompress.deploy`).

    Raises:
        ImportError: FBGEMM is not installed.
        ValueError: a plan that FBGEMM's kernel cannot run, or tables that are not deployed.
    """

    def __init__(self, module: EmbeddingBag | EmbeddingBagCollection) -> None:
        super().__init__()
        if isinstance(module, EmbeddingBag):
            features = [module]
            self._include_last_offset = bool(module.include_last_offset)
        else:
            features = list(module.tables_of_features().values())
            self._include_last_offset = True
        tables = list(dict.fromkeys(features))
        for table in tables:
            _check(table)
        self._readers = nn.ModuleList([_Reader(table) for table in tables])
        self._tables_of_features = [tables.index(table) for table in features]
        self._has_signs = any(
            isinstance(probe.scale, Sign) for table in tables for probe in table.plan.probes
        )
        self._kernel = self._make_kernel(tables)

    def _make_kernel(self, tables: Sequence[EmbeddingBag]) -> nn.Module:
        """FBGEMM's module, with a table for every store, read by all reads of all features."""
        numbers: dict[tuple[str, int], int] = {}
        found: list[_Table] = []
        reads: list[int] = []
        for number in self._tables_of_features:
            stores = tables[number].stores()
            for store in self._reader(number).stores:
                key = storage_key(stores[store.name])
                if key not in numbers:
                    numbers[key] = len(found)
                    found.append(_as_table(tables[number].plan, store, stores))
                reads.append(numbers[key])
        self._columns = [found[number].columns for number in reads]
        return _kernel(found, reads)

    def _reader(self, number: int) -> _Reader:
        reader = self._readers[number]
        assert isinstance(reader, _Reader)
        return reader

    @torch.no_grad()
    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Pooled vectors.

        Args:
            input, offsets, per_sample_weights: as of the module that this was made from (of a
                collection, ids and offsets, feature-major).

        Returns:
            (B, sum of embedding_dim) float32.

        Raises:
            IndexError: an id outside its table.
            ValueError: offsets that describe no bags, or weights with a mean.
        """
        bags = make_bags(
            input, offsets, per_sample_weights, include_last_offset=self._include_last_offset
        )
        weighted = bags.weights is not None or self._has_signs
        parts = self._split_features(bags)
        requests = [
            self._reader(number).requests(part, weighted)
            for number, part in zip(self._tables_of_features, parts, strict=True)
        ]
        pooled = self._pool([request for each in requests for request in each], weighted)
        answers = iter(pooled.split(self._columns, dim=1))
        vectors = [
            self._reader(number).assemble_codes(part, each, [next(answers) for _ in each])
            for number, part, each in zip(self._tables_of_features, parts, requests, strict=True)
        ]
        return torch.cat(vectors, dim=1)

    def _split_features(self, bags: Bags) -> list[Bags]:
        count = len(self._tables_of_features)
        batch, rest = divmod(bags.offsets.numel() - 1, count)
        if rest:
            raise ValueError(
                f"offsets has {bags.offsets.numel()} entries, which is not {count} features * B + 1"
            )
        ends = bags.offsets[::batch].tolist() if batch else [0] * (count + 1)
        parts = []
        for number, (begin, end) in enumerate(pairwise(ends)):
            offsets = bags.offsets[number * batch : (number + 1) * batch + 1] - begin
            weights = None if bags.weights is None else bags.weights[begin:end]
            parts.append(Bags(bags.ids[begin:end], offsets, weights))
        return parts

    def _pool(self, requests: Sequence[Jagged], weighted: bool) -> Tensor:
        """Sums of the rows of all requests, side by side."""
        rows = torch.cat([each.rows for each in requests])
        lengths = torch.cat([each.lengths for each in requests])
        weights = [w.float() for each in requests if (w := each.weights) is not None]
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        pooled: Tensor = self._kernel(rows, offsets, torch.cat(weights) if weighted else None)
        return pooled


class _Reader(PooledReader):
    """A table whose codes are pooled before they become values."""

    def __init__(self, table: EmbeddingBag) -> None:
        plan, stores = table.plan, table.stores()
        reads = pooled_reads(plan)
        read = {each.store for each in reads}
        held = {name: tensor.detach() for name, tensor in stores.items() if name not in read}
        super().__init__(plan, reads, held, 1.0)
        self.stores = [plan.store(each.store) for each in reads]
        self.requires_grad_(False)

    def assemble_codes(
        self, bags: Bags, requests: Sequence[Jagged], answers: Sequence[Tensor]
    ) -> Tensor:
        """Vectors from sums of codes: Σ w·(s·c + b) = s·Σ w·c + b·Σ w."""
        if bags.weights is not None and self.plan.pool != "sum":
            raise ValueError(f"weights need mode='sum', this table has {self.plan.pool!r}")
        values = []
        for store, request, answer in zip(self.stores, requests, answers, strict=True):
            value = answer[:, : store.width]
            if store.quantization is not None and not has_row_scales(self.plan, store):
                scale, bias = self._steps(store)
                value = value * scale + request.total_weights()[:, None] * bias
            values.append(value)
        return self.assemble(bags, values)

    def _steps(self, store: Store) -> tuple[Tensor, Tensor]:
        """Scale and bias that the rows of a store share."""
        assert store.quantization is not None
        scale = getattr(self, store.quantization.scale).float()
        if store.quantization.bias is None:
            return scale, -scale * (2**store.bits - 1) / 2
        return scale, getattr(self, store.quantization.bias).float()


def has_row_scales(plan: LookupPlan, store: Store) -> bool:
    """Whether each row of a quantized store has a scale for itself."""
    return store.quantization is not None and plan.store(store.quantization.scale).rows > 1


def _check(table: EmbeddingBag) -> None:
    plan = table.plan
    if not is_summed(plan):
        raise ValueError(
            f"FBGEMM's kernel sums rows, and this plan needs more; run it by the engine: {plan}"
        )
    if table.latents():
        raise ValueError("the table holds latents; call embcompress.deploy first")
    for probe in plan.probes:
        store = plan.store(probe.store)
        if store.sparsity is not None or store.threshold is not None:
            raise ValueError(f"FBGEMM has no sparse rows; store {store.name!r}")
        if store.is_in_file:
            raise ValueError(f"FBGEMM has no rows in files; store {store.name!r}")
        if store.is_float and store.dtype not in _FLOATS:
            raise ValueError(f"FBGEMM has no rows of {store.dtype}; store {store.name!r}")
        names = store.quantization
        if names is not None and store.bits not in _BITS and store.bits != 1:
            raise ValueError(f"FBGEMM has no codes of {store.bits} bits; store {store.name!r}")
        if names is not None and has_row_scales(plan, store) and plan.store(names.scale).width > 1:
            raise ValueError(f"store {store.name!r} has a scale for each number")


def _as_table(plan: LookupPlan, store: Store, stores: Mapping[str, Tensor]) -> _Table:
    """A store in FBGEMM's layout."""
    tensor = stores[store.name].detach()
    if store.quantization is None:
        return _Table(
            _FLOATS[store.dtype], store.width, tensor.contiguous().view(torch.uint8), None
        )
    bits = max(2, store.bits)
    columns = -(-store.width * bits // 8) * 8 // bits
    parameters = torch.tensor([[1.0, 0.0]]).expand(store.rows, 2)  # the codes themselves
    if has_row_scales(plan, store):
        scale = stores[store.quantization.scale].float()
        bias = store.quantization.bias
        shift = -scale * (2**store.bits - 1) / 2 if bias is None else stores[bias].float()
        parameters = torch.cat([scale, shift], dim=1)
    rows = _padded_codes(tensor, store, bits, columns)
    halves = parameters.to(rows.device, torch.float16).contiguous().view(torch.uint8)
    return _Table(_BITS[bits], columns, rows, halves)


def _padded_codes(packed: Tensor, store: Store, bits: int, columns: int) -> Tensor:
    """(rows, bytes) uint8: the codes of every row in whole bytes."""
    if (bits, columns) == (store.bits, store.width):
        return packed.view(store.rows, -1)
    parts = []
    for first in range(0, store.rows, _CHUNK_ROWS):
        last = min(first + _CHUNK_ROWS, store.rows)
        codes = unpack_codes(packed, first * store.width, last * store.width, store.bits)
        codes = F.pad(codes.view(-1, store.width), (0, columns - store.width))
        parts.append(pack_codes(codes.reshape(-1), bits).view(last - first, -1))
    return torch.cat(parts)


def _kernel(tables: Sequence[_Table], reads: Sequence[int]) -> nn.Module:
    """FBGEMM's module over the tables; each read is of one of them."""
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            IntNBitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError as error:
        raise ImportError(
            "BatchedLookup needs fbgemm-gpu or fbgemm-gpu-cpu; docs/torchrec.md has the versions "
            "that go together"
        ) from error
    device = tables[0].rows.device
    location = EmbeddingLocation.HOST if device.type == "cpu" else EmbeddingLocation.DEVICE
    kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
        [
            (str(number), len(table.rows), table.columns, SparseType[table.kind], location)
            for number, table in enumerate(tables)
        ],
        feature_table_map=list(reads),
        output_dtype=SparseType.FP32,
        device=device,
        indices_dtype=torch.int64,
    )
    kernel.initialize_weights()
    for (rows, parameters), table in zip(kernel.split_embedding_weights(), tables, strict=True):
        rows.copy_(table.rows)
        if table.parameters is not None:
            parameters.copy_(table.parameters)
    return kernel
