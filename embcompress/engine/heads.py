"""Heads that are not linear, in torch: chains of cores and small networks.

No kernel runs them: kernels gather the vectors of all ids, these map them, and bags are pooled at
last. Written with differentiable operators alone, in the dtype of the vectors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from embcompress.plan import Head, Linear, LookupPlan, Network, TensorTrain

Stores = Mapping[str, Tensor]


def is_linear(head: Head | None) -> bool:
    """Whether a sum of vectors may be taken before the head instead of after it."""
    return head is None or isinstance(head, Linear)


def apply_head(plan: LookupPlan, stores: Stores, vectors: Tensor) -> Tensor:
    """(N, embedding_dim) from the (N, plan.width) combined vectors, in their dtype.

    Under autocast products may be computed in fewer bits, but a lookup returns what it always does.
    """
    if plan.head is None:
        return vectors
    if isinstance(plan.head, TensorTrain):
        mapped = multiply_cores(plan.head, vectors)
    elif isinstance(plan.head, Network):
        mapped = run_network(plan.head, stores, vectors)
    else:
        mapped = F.linear(vectors, stores[plan.head.weight].to(vectors.dtype))
    return mapped.to(vectors.dtype)


def multiply_cores(head: TensorTrain, vectors: Tensor) -> Tensor:
    """(N, ∏ widths): the product of the cores that lie side by side in each vector."""
    cores = vectors.split(head.sizes, dim=1)
    _, columns, rank = head.shapes[0]
    # Not len(): an exported graph would take it for a constant.
    product = cores[0].reshape(vectors.shape[0], columns, rank)
    for core, (before, width, after) in zip(cores[1:], head.shapes[1:], strict=True):
        columns *= width
        product = product.bmm(core.reshape(vectors.shape[0], before, width * after))
        product = product.reshape(vectors.shape[0], columns, after)
    return product.squeeze(2)


def run_network(head: Network, stores: Stores, vectors: Tensor) -> Tensor:
    """(N, outputs): layers with Mish between them, of normalized sums."""
    last = len(head.weights) - 1
    dtype = vectors.dtype
    for number, (weight, bias) in enumerate(zip(head.weights, head.biases, strict=True)):
        vectors = F.linear(vectors, stores[weight].to(dtype), stores[bias][0].to(dtype))
        if number < last:
            vectors = F.mish(F.layer_norm(vectors, vectors.shape[1:]))
    return vectors
