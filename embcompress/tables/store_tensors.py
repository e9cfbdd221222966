"""Tensors for the stores of a plan, in the form that is trained and in the deployed one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from embcompress.engine.file_tensors import file_tensor
from embcompress.layouts.sparse import even_mask, mask_bytes
from embcompress.plan import LookupPlan, Store


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def is_latent(store: Store, values: Tensor) -> bool:
    """Whether a quantized or sparse store is held in the form that is trained."""
    if store.sparsity is not None:
        return values.dim() == 2
    return store.quantization is not None and values.is_floating_point()


def check_device(plan: LookupPlan, device: torch.device) -> None:
    """Refuse to put rows that are in a file on a device whose kernels cannot read them."""
    if device.type not in ("cpu", "meta"):
        names = [store.name for store in plan.stores if store.is_in_file]
        raise ValueError(
            f"stores {names} are in files, which the CPU reads, and cannot be on device "
            f"{str(device)!r}; leave this table on the CPU, or choose another method"
        )


def new_store(
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


def empty_stores(
    plan: LookupPlan,
    device: torch.device | str | None,
    deployed: bool = False,
    directory: str | None = None,
) -> dict[str, Tensor]:
    """Tensors for the stores of a plan: floats of any value, codes that are zero.

    Masks of latents keep as many numbers as the plan.

    Raises:
        ValueError: a store in a file, for another device than the CPU.
        OSError: the file cannot be made (:func:`embcompress.engine.file_tensors.file_tensor`).
    """
    if plan.offloaded:
        own = torch.get_default_device() if device is None else torch.device(device)
        check_device(plan, own)
    stores = {
        store.name: new_store(plan, store, deployed, device, directory) for store in plan.stores
    }
    for store in plan.stores:
        if store.sparsity is not None and not deployed:
            stores[store.sparsity.index] = even_mask(store, device)
    return stores


def check_stores(plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
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
