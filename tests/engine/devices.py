"""The devices that tests of the engine run on: the CPU, and a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from embcompress.engine import ops
from embcompress.engine.encoding import can_encode, needs_cpu_kernels
from tests.plan_cases import Case

HAS_GPU = torch.cuda.is_available() and ops.has_cuda_kernels()
needs_gpu = pytest.mark.skipif(
    not HAS_GPU, reason="no GPU, or the extension was built without its CUDA kernels"
)

#: For ``pytest.mark.parametrize("device", DEVICES)``.
DEVICES: list[Any] = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]


def to_device(case: Case, device: str) -> Case:
    """The case with its tensors on a device; gradients flow back to where they were."""
    bags = case.bags
    weights = None if bags.weights is None else bags.weights.to(device)
    bags = replace(bags, ids=bags.ids.to(device), offsets=bags.offsets.to(device), weights=weights)
    stores = {name: tensor.to(device) for name, tensor in case.stores.items()}
    return replace(case, stores=stores, bags=bags)


def runs_in_kernels(case: Case) -> bool:
    """Whether torch has no part in the lookup of a case, be it on a GPU or on the CPU."""
    doubles = case.bags.weights is not None and case.bags.weights.dtype == torch.float64
    in_torch = case.plan.head is not None or case.plan.pool == "max" or case.plan.is_dense
    for_cpu = needs_cpu_kernels(case.plan)
    return can_encode(case.plan) and not (doubles or in_torch or for_cpu)
