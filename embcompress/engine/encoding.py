"""Plans as one flat int64 tensor, the form that the kernels read.

The layout is that of the structs in ``csrc/plan.h``, field by field: a header, a record for every
feature, a record for every probe. It is built once for a module, never per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embcompress.plan import (
    Address,
    Code,
    Digit,
    DirectAddress,
    Linear,
    LookupPlan,
    MurmurHash,
    Probe,
    Sign,
    Slot,
    Store,
    Weight,
)

FORMAT = 9
HEADER_FIELDS, FEATURE_FIELDS, PROBE_FIELDS, HEAD_STORE_FIELD = 4, 10, 76, 8
#: Pools that the kernels run; maxima pool the kernels' vectors in torch.
POOLS = {"none": 0, "sum": 1, "mean": 2}
#: A concatenation is a sum of rows in columns of their own.
_SUM, _MULTIPLY, _PLACE = 0, 1, 2
_KERNEL_FLOATS = ("float32", "float16", "bfloat16")
_NO_ADDRESS = [0, 1, 1]
_NO_SLOT = [0, *_NO_ADDRESS]
_NO_TABLE = [-1, 0, 0, 0, 0, 0, *_NO_SLOT]
_NO_CODE = [*_NO_TABLE, 0, *_NO_ADDRESS, *_NO_TABLE]
_NO_SCALE = [0, 0, -1, 0, *_NO_ADDRESS, *_NO_CODE]
_NO_QUANTIZATION = [0, -1, -1, 0, 0]
_NO_SPARSITY = [0, 0, 0, 0, -1, 0, -1, 0]
_FORMS = {"mask": 1, "positions": 2}


@dataclass(frozen=True)
class EncodedPlans:
    """What the operators need to know of the plans of some features.

    Attributes:
        tensor: int64, on the CPU.
        num_columns: columns of the output.
    """

    tensor: Tensor
    num_columns: int


def head_stores(encoding: Tensor) -> set[int]:
    """Positions of the stores that are heads, from the tensor of :class:`EncodedPlans`."""
    num_features = int(encoding[1])
    features = encoding[HEADER_FIELDS : HEADER_FIELDS + num_features * FEATURE_FIELDS]
    return set(features.view(num_features, FEATURE_FIELDS)[:, HEAD_STORE_FIELD].tolist()) - {-1}


def record_bytes(plan: LookupPlan) -> int:
    """Bytes of a plan's records: of its feature, and of every probe."""
    return (FEATURE_FIELDS + PROBE_FIELDS * len(plan.probes)) * torch.int64.itemsize


def can_encode(plan: LookupPlan) -> bool:
    """Whether the kernels gather what this plan reads.

    Float64 and thresholds are the reference's, and so are plans that gather nothing.
    """
    return len(plan.probes) > 0 and all(
        not store.is_float or (store.dtype in _KERNEL_FLOATS and store.threshold is None)
        for store in plan.stores
    )


def needs_cpu_kernels(plan: LookupPlan) -> bool:
    """Whether only the CPU's kernels run this plan: those of GPUs run no heads, and no rows that
    overlap or are sparse."""
    return isinstance(plan.head, Linear) or any(
        store.stride is not None or store.sparsity is not None for store in plan.stores
    )


def encode_plans(
    plans: Sequence[LookupPlan], store_numbers: Sequence[dict[str, int]]
) -> EncodedPlans:
    """Encode the plans of some features.

    Args:
        plans: one for each feature; :func:`can_encode` holds for all.
        store_numbers: for each feature, the position of its stores in the operator's list.
    """
    features: list[int] = []
    probes: list[list[int]] = []
    column = 0
    for plan, numbers in zip(plans, store_numbers, strict=True):
        features += [
            plan.num_embeddings,
            -1 if plan.padding_idx is None else plan.padding_idx,
            POOLS[plan.pool],
            _combine(plan),
            plan.width,
            column,
            len(probes),
            len(plan.probes),
            numbers[plan.head.weight] if isinstance(plan.head, Linear) else -1,
            plan.embedding_dim,
        ]
        probes += _encode_probes(plan, numbers)
        column += plan.embedding_dim
    header = [FORMAT, len(plans), len(probes), column]
    values = [*header, *features, *(value for probe in probes for value in probe)]
    tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
    return EncodedPlans(tensor, column)


def _combine(plan: LookupPlan) -> int:
    if plan.combine == "mul":
        return _MULTIPLY
    return _SUM if set(plan.columns) == {(0, plan.width)} else _PLACE


def _encode_probes(plan: LookupPlan, numbers: dict[str, int]) -> list[list[int]]:
    records = []
    for probe, (column, _) in zip(plan.probes, plan.columns, strict=True):
        store = plan.store(probe.store)
        records.append(
            [
                numbers[store.name],
                probe.offset,
                column,
                store.width,
                store.step,
                *_encode_address(plan, probe.address, numbers),
                *_encode_scale(plan, probe, numbers),
                *_encode_quantization(plan, probe, numbers),
                *_encode_sparsity(plan, store, numbers),
            ]
        )
    return records


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value


def _encode_direct(address: DirectAddress) -> list[int]:
    if isinstance(address, Digit):
        return [0, address.divisor, address.radix]
    if isinstance(address, MurmurHash):
        return [2, address.word << 32 | address.seed, address.buckets]
    return [1, _signed(address.key), address.buckets]


def _encode_address(plan: LookupPlan, address: Address, numbers: dict[str, int]) -> list[int]:
    """An address and a code: that of the row among the codes, where there is a code."""
    first = _encode_table(plan, address, numbers)
    if not isinstance(address, Code | Slot) or address.otherwise is None:
        return [*first, 0, *_NO_ADDRESS, *_NO_TABLE]
    return [*first, 1, *_encode_table(plan, address.otherwise, numbers)]


def _encode_table(plan: LookupPlan, address: Address, numbers: dict[str, int]) -> list[int]:
    """An address, and the table of codes or slots in which it is the row, if it is."""
    if isinstance(address, Code):
        column, inside, tag = address.column, address.row, _NO_SLOT
    elif isinstance(address, Slot):
        column, inside, tag = 0, address.bucket, [1, *_encode_direct(address.tag)]
    else:
        return [*_encode_direct(address), *_NO_TABLE]
    store = plan.store(address.store)
    table = [numbers[store.name], store.bits, store.width, column, address.first, address.size]
    return [*_encode_direct(inside), *table, *tag]


def _encode_scale(plan: LookupPlan, probe: Probe, numbers: dict[str, int]) -> list[int]:
    scale = probe.scale
    if isinstance(scale, Sign):
        return [1, _signed(scale.key), -1, 0, *_NO_ADDRESS, *_NO_CODE]
    if isinstance(scale, Weight):
        address = _encode_address(plan, scale.address, numbers)
        return [2, 0, numbers[scale.store], scale.column, *address]
    return _NO_SCALE


def _encode_quantization(plan: LookupPlan, probe: Probe, numbers: dict[str, int]) -> list[int]:
    store = plan.store(probe.store)
    if store.quantization is None:
        return _NO_QUANTIZATION
    scale = plan.store(store.quantization.scale)
    bias = store.quantization.bias
    return [
        store.bits,
        numbers[scale.name],
        -1 if bias is None else numbers[bias],
        int(scale.rows > 1),
        int(scale.width > 1),
    ]


def _encode_sparsity(plan: LookupPlan, store: Store, numbers: dict[str, int]) -> list[int]:
    sparsity = store.sparsity
    if sparsity is None:
        return _NO_SPARSITY
    index, starts = plan.store(sparsity.index), plan.store(sparsity.starts)
    return [
        _FORMS[sparsity.form],
        sparsity.stored,
        store.rows,
        sparsity.block,
        numbers[index.name],
        index.bits,
        numbers[starts.name],
        starts.bits,
    ]
