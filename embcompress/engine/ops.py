"""The compiled operators ``embcompress::*``: loading, fake kernels, autograd, side by side.

Schemas and kernels are in ``csrc/ops.cpp``. Without the extension, or with
``EMBCOMPRESS_ENGINE=reference`` in the environment, :func:`is_available` is False and everything
runs through the reference. ``EMBCOMPRESS_LIBRARY=PATH`` loads another build of the extension, such
as the one with sanitizers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embcompress.engine.encoding import head_stores


def _load() -> bool:
    """Load the extension, which registers its operators; warn if it is there but will not load."""
    if os.environ.get("EMBCOMPRESS_ENGINE", "compiled") == "reference":
        return False
    if library := os.environ.get("EMBCOMPRESS_LIBRARY"):
        torch.ops.load_library(library)
        return True
    if importlib.util.find_spec("embcompress._C") is None:
        return False
    try:
        importlib.import_module("embcompress._C")
    except ImportError as error:
        warnings.warn(
            f"the compiled engine cannot be loaded ({error}); the slower pure-torch one runs. "
            "It may have been built for another torch: install embcompress again",
            stacklevel=2,
        )
        return False
    return True


_LOADED = _load()
_HAS_CUDA = _LOADED and torch._C._dispatch_has_kernel_for_dispatch_key(
    "embcompress::lookup_forward", "CUDA"
)
#: Types of the devices whose kernels run no heads and no overlapping or sparse rows: those that
#: report, as csrc/cuda does.
_PLAIN_PLANS_ONLY = frozenset(
    kind
    for kind in ("cpu", "cuda")
    if _LOADED
    and torch._C._dispatch_has_kernel_for_dispatch_key("embcompress::raise_reported", kind.upper())
)


def is_available() -> bool:
    """Whether the compiled engine is there."""
    return _LOADED


def has_cuda_kernels() -> bool:
    """Whether the extension was built with its CUDA kernels."""
    return _HAS_CUDA


def runs_on(device: torch.device) -> bool:
    """Whether the compiled operators run on a device.

    Raises:
        RuntimeError: a CUDA device, and an extension without CUDA kernels: the reference would
            answer, but many times slower than anybody expects.
    """
    if device.type == "cuda" and not has_cuda_kernels():
        raise RuntimeError(
            "embcompress was built without its CUDA kernels: install it again where torch is a "
            "CUDA build and nvcc is found (the build says what it built), move tables and ids to "
            "the CPU, or set EMBCOMPRESS_ENGINE=reference for the slow pure-torch engine"
        )
    return device.type in ("cpu", "cuda")


def runs_every_plan(device: torch.device) -> bool:
    """Whether the compiled operators of a device run heads and overlapping and sparse rows, too;
    the CUDA kernels run none of them."""
    return device.type not in _PLAIN_PLANS_ONLY


def has_kernels_without_heads() -> bool:
    """Whether there is a device whose kernels run no heads."""
    return bool(_PLAIN_PLANS_ONLY)


def is_report(error: RuntimeError) -> bool:
    """Whether an operator raised what a CUDA kernel reported, of this call or an earlier one."""
    return "CUDA_LAUNCH_BLOCKING=1 tells which" in str(error)


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Wait for a CUDA device, and raise what its lookups have found wrong with ids or offsets.

    Kernels report to the host without making it wait, so a lookup or its backward pass raises what
    an earlier one found. This is for the last of them, and for replayed CUDA graphs.

    Raises:
        RuntimeError: an id was outside its vocabulary, or offsets did not rise.
    """
    torch.cuda.synchronize(device)
    if has_cuda_kernels():
        torch.ops.embcompress.raise_reported(torch.empty(0, device=device or "cuda"))


# --------------------------------------------------------------------------------- fake kernels


def _fake_lookup(
    stores: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    encoding: Tensor,
    ends_are_given: bool,
    num_features: int,
    num_columns: int,
    sparse: bool,
) -> Tensor:
    bags = ids.shape[0] if offsets is None else offsets.shape[0] - ends_are_given
    return ids.new_empty((bags // num_features, num_columns), dtype=torch.float32)


def _fake_lookup_backward(
    grad: Tensor,
    stores: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    encoding: Tensor,
    ends_are_given: bool,
    wanted: Sequence[int],
) -> list[Tensor]:
    return [grad.new_empty(stores[number].shape) for number in wanted]


def _fake_lookup_backward_sparse(
    grad: Tensor,
    stores: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    encoding: Tensor,
    ends_are_given: bool,
    wanted: Sequence[int],
) -> list[Tensor]:
    touched = []
    for number in wanted:
        count = torch.library.get_ctx().new_dynamic_size()
        touched.append(ids.new_empty((count,), dtype=torch.int64))
        touched.append(grad.new_empty((count, stores[number].shape[1])))
    return touched


def _fake_lookup_backward_weights(
    grad: Tensor,
    stores: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    encoding: Tensor,
    ends_are_given: bool,
) -> Tensor:
    return grad.new_empty(ids.shape)


def _fake_lookup_backward_update(*arguments: Any) -> None:
    """Nothing comes back: stores and state change in place."""


def _fake_lookup_fused(
    anchor: Tensor,
    stores: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    encoding: Tensor,
    ends_are_given: bool,
    num_features: int,
    num_columns: int,
    *update: Any,
) -> Tensor:
    return _fake_lookup(
        stores, ids, offsets, weights, encoding, ends_are_given, num_features, num_columns, False
    )


# ------------------------------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    stores, ids, offsets, weights, encoding, ends_are_given, _, _, sparse = inputs
    # Saved together, so that a change between forward and backward is noticed.
    ctx.save_for_backward(ids, offsets, weights, encoding, *stores)
    ctx.sparse, ctx.ends_are_given = sparse, ends_are_given
    ctx.wanted = [number for number, store in enumerate(stores) if store.requires_grad]


def _gradients(
    ctx: Any, grad: Tensor, weights_are_wanted: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the per-sample weights and of each store."""
    ids, offsets, weights, encoding, *stores = ctx.saved_tensors
    arguments = (grad.contiguous(), stores, ids, offsets, weights, encoding, ctx.ends_are_given)
    weights_gradient = None
    if weights_are_wanted:
        weights_gradient = torch.ops.embcompress.lookup_backward_weights(*arguments)
        weights_gradient = weights_gradient.to(weights.dtype)
    gradients: list[Tensor | None] = [None] * len(stores)
    if ctx.wanted:
        for number, gradient in zip(ctx.wanted, _store_gradients(ctx, arguments), strict=True):
            gradients[number] = gradient.to(stores[number].dtype)
    return weights_gradient, gradients


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights_gradient, gradients = _gradients(ctx, grad, ctx.needs_input_grad[3])
    return gradients, None, None, weights_gradient, None, None, None, None, None


def _store_gradients(ctx: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    if not ctx.sparse:
        return torch.ops.embcompress.lookup_backward(*arguments, ctx.wanted)
    parts = torch.ops.embcompress.lookup_backward_sparse(*arguments, ctx.wanted)
    stores, heads = arguments[1], head_stores(arguments[5])
    gradients = []
    for number, rows, values in zip(ctx.wanted, parts[::2], parts[1::2], strict=True):
        shape = stores[number].shape
        if number in heads:  # every bag touches all of it
            gradients.append(values if len(values) else values.new_zeros(shape))
        else:
            gradients.append(
                torch.sparse_coo_tensor(
                    rows[None], values, shape, is_coalesced=True, check_invariants=False
                )
            )
    return gradients


class _Lookup(torch.autograd.Function):
    """``lookup_forward`` with the gradients of ``lookup``."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor | None, inputs: list[Any], *stores: Tensor) -> Tensor:
        inputs[0], inputs[3] = stores, weights
        _setup_context(ctx, tuple(inputs), None)
        return lookup_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weights_gradient, gradients = _gradients(ctx, grads[0], ctx.needs_input_grad[0])
        return weights_gradient, None, *gradients


class _TransformedLookup(torch.autograd.Function):
    """The same in the form that ``torch.func`` takes, which costs more."""

    @staticmethod
    def forward(
        weights: Tensor | None,
        ids: Tensor,
        offsets: Tensor | None,
        encoding: Tensor,
        shape: tuple[bool, int, int, bool],
        *stores: Tensor,
    ) -> Tensor:
        return lookup_forward(stores, ids, offsets, weights, encoding, *shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, ids, offsets, encoding, shape, *stores = inputs
        _setup_context(ctx, (stores, ids, offsets, weights, encoding, *shape), output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weights_gradient, gradients = _gradients(ctx, grads[0], ctx.needs_input_grad[0])
        return weights_gradient, None, None, None, None, *gradients


def lookup(
    stores: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    encoding: Tensor,
    ends_are_given: bool,
    num_features: int,
    num_columns: int,
    sparse: bool,
) -> Tensor:
    """``embcompress::lookup``, by the cheapest way that the situation allows.

    A gradient formula that is registered from Python is what compilers need, and costs more than
    the lookup of a small batch: eager code goes around it.
    """
    inputs = [
        stores, ids, offsets, weights, encoding, ends_are_given, num_features, num_columns, sparse,
    ]  # fmt: skip
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return torch.ops.embcompress.lookup(*inputs)
    if torch.is_grad_enabled():
        trained = any(store.requires_grad for store in stores)
        if trained or (weights is not None and weights.requires_grad):
            if torch._C._are_functorch_transforms_active():
                shape = (ends_are_given, num_features, num_columns, sparse)
                return _TransformedLookup.apply(weights, ids, offsets, encoding, shape, *stores)
            return _Lookup.apply(weights, inputs, *stores)
    return lookup_forward(*inputs)


if _LOADED:
    lookup_forward = torch.ops.embcompress.lookup_forward.default
    for _name, _fake in (
        ("lookup", _fake_lookup),
        ("lookup_forward", _fake_lookup),
        ("lookup_backward", _fake_lookup_backward),
        ("lookup_backward_sparse", _fake_lookup_backward_sparse),
        ("lookup_backward_weights", _fake_lookup_backward_weights),
        ("lookup_backward_update", _fake_lookup_backward_update),
        ("lookup_fused", _fake_lookup_fused),
    ):
        torch.library.register_fake(f"embcompress::{_name}", _fake)
    torch.library.register_autograd("embcompress::lookup", _backward, setup_context=_setup_context)
