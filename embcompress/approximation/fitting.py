"""Stores whose vectors approximate a trained table, in the sense of least squares.

The squared error of every id counts as often as the id occurs, where that is known. A lookup is
linear in its stores, or in some of them while the others stay (the factors of a product, rows and
projection): conjugate gradients through the lookup and its transpose solve each such problem, for
any plan. Nothing here holds more than two tables of the dense size besides the trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.engine import Bags, lookup
from embcompress.initialization import initialize_stores
from embcompress.plan import LookupPlan, Network, TensorTrain, Weight

Stores = dict[str, Tensor]

_CHUNK = 1 << 16  # ids
_ITERATIONS = 30
_ROUNDS = 8
_TOLERANCE = 1e-5


def relative_error(weight: Tensor, approximation: Callable[[Tensor], Tensor],
                   counts: Tensor | None = None) -> float:  # fmt: skip
    """Relative error of an approximation, √(Σ c·|v − w|² / Σ c·|w|²) over ids.

    Args:
        weight: (n, d) the trained table.
        approximation: gives the (k, d) vectors of k ids.
        counts: (n,) weights c of the ids, or None for equal ones.
    """
    wrong = total = 0.0
    for ids in torch.arange(len(weight), device=weight.device).split(_CHUNK):
        rows = weight[ids].double()
        share = torch.ones(len(ids), dtype=torch.float64) if counts is None else counts[ids]
        share = share.to(rows)
        wrong += float(share @ (approximation(ids).double() - rows).square().sum(1))
        total += float(share @ rows.square().sum(1))
    return (wrong / total) ** 0.5 if total > 0 else float(wrong > 0)


def principal_directions(weight: Tensor, rank: int, counts: Tensor | None = None) -> Tensor:
    """Orthonormal (d, rank) directions that keep most of the table's squared length.

    These are right singular vectors of the table with rows weighted by √c, from the d × d
    matrix of second moments: the table is read once and never copied.
    """
    moments = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for ids in torch.arange(len(weight)).split(_CHUNK):
        rows = weight[ids].double().cpu()
        weighted = rows if counts is None else rows * counts[ids].double().cpu()[:, None]
        moments += rows.T @ weighted
    vectors = torch.linalg.eigh(moments).eigenvectors  # of rising eigenvalues
    return vectors[:, -rank:].flip(1).to(weight)


def new_stores(plan: LookupPlan, seed: int) -> Stores:
    """Stores of a plan with start values of their own; packed ones are zero."""
    stores = {
        store.name: torch.empty(store.shape)
        if store.is_float
        else torch.zeros(store.bytes, dtype=torch.uint8)
        for store in plan.stores
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialize_stores(plan, stores)
    if plan.combine == "mul":  # the first factor starts as the mean of its ids' rows
        for probe in plan.probes:
            stores[probe.store].fill_(1.0)
    return stores


def fit_stores(
    plan: LookupPlan, stores: Stores, weight: Tensor, counts: Tensor | None = None
) -> Stores:
    """Fit the float stores of a plan to a trained table.

    Args:
        plan: of any kind, without quantized stores.
        stores: start values, float32, and the packed codes.
        weight: (n, d) float.
        counts: (n,) weights of the ids; ids that never occur still count a little.

    Returns:
        All stores; those that nothing reads keep their start values.

    Raises:
        ValueError: numbers that are NaN or infinite, or a plan with a network.
    """
    if isinstance(plan.head, Network):
        raise ValueError("the vectors of a network are linear in no store of it; train the network")
    check_finite(weight)
    plan = plan.with_pool("none").with_dtypes(
        {s.name: "float32" for s in plan.stores if s.is_float}
    )
    problem = _Problem(plan, weight, _shares(len(weight), counts))
    blocks = _linear_blocks(plan)
    for _ in range(_ROUNDS if len(blocks) > 1 else 1):
        for names in blocks:
            stores = {**stores, **problem.solve(stores, names)}
    return stores


def _shares(rows: int, counts: Tensor | None) -> Tensor:
    if counts is None:
        return torch.ones(rows)
    shares = counts.float().cpu()
    return shares + max(1e-3, 1e-3 * float(shares.mean()))


def _linear_blocks(plan: LookupPlan) -> list[list[str]]:
    """Names of stores in which the lookup is linear together, the others given."""
    rows = list(dict.fromkeys(probe.store for probe in plan.probes))
    scales = [p.scale.store for p in plan.probes if isinstance(p.scale, Weight)]
    is_product = plan.combine == "mul" or isinstance(plan.head, TensorTrain)
    blocks = [[name] for name in rows] if is_product else [rows]
    blocks += [[name] for name in dict.fromkeys(scales)]
    return [*blocks, *([name] for name in plan.head_stores)]


class _Problem:
    """Weighted least squares in some stores of a plan: Σ c·|lookup(id) − weight[id]|²."""

    def __init__(self, plan: LookupPlan, weight: Tensor, shares: Tensor) -> None:
        self.plan, self.weight, self.shares = plan, weight, shares

    def _chunks(self) -> Sequence[Tensor]:
        return torch.arange(len(self.weight)).split(_CHUNK)

    def _vectors(self, stores: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        return lookup(self.plan, stores, Bags(ids, ids))

    def residual(self, stores: Stores) -> Tensor:
        """(n, d) of what the vectors lack."""
        result = torch.empty(self.weight.shape, dtype=torch.float32)
        for ids in self._chunks():
            result[ids] = self.weight[ids].float().cpu() - self._vectors(stores, ids)
        return result

    def apply(self, stores: Stores, direction: Stores) -> Tensor:
        """(n, d) change of the vectors where the stores change by a direction."""
        changed = {**stores, **direction}
        result = torch.empty(self.weight.shape, dtype=torch.float32)
        for ids in self._chunks():
            result[ids] = self._vectors(changed, ids)
        return result

    def transpose(self, stores: Stores, names: Sequence[str], vectors: Tensor) -> Stores:
        """The transpose of :meth:`apply`, on c·vectors."""
        total = {name: torch.zeros_like(stores[name]) for name in names}
        for ids in self._chunks():
            # A linear function has one gradient everywhere.
            leaves = {name: stores[name].detach().requires_grad_() for name in names}
            with torch.enable_grad():
                output = self._vectors({**stores, **leaves}, ids)
                weighted = vectors[ids] * self.shares[ids, None]
                gradients = torch.autograd.grad(output, list(leaves.values()), weighted)
            for name, gradient in zip(names, gradients, strict=True):
                total[name] += gradient
        return total

    def diagonal(self, stores: Stores, names: Sequence[str]) -> Stores:
        """About the diagonal of the normal equations: exact where an id reads a row once."""
        squared = {
            name: store if name in names or not store.is_floating_point() else store.square()
            for name, store in stores.items()
        }
        parts = self.transpose(squared, names, torch.ones(self.weight.shape))
        largest = max(float(part.abs().max()) for part in parts.values())
        return {name: part.abs().clamp_min(1e-6 * largest + 1e-30) for name, part in parts.items()}

    def solve(self, stores: Stores, names: Sequence[str]) -> Stores:
        """The best values of the named stores, by preconditioned conjugate gradients."""
        solution = {name: stores[name].clone() for name in names}
        scale = self.diagonal(stores, names)
        residual = self.residual(stores)
        descent = self.transpose(stores, names, residual)
        step = {name: descent[name] / scale[name] for name in names}
        slope = first = _dot(descent, step)
        for _ in range(_ITERATIONS):
            if not slope > _TOLERANCE**2 * first:
                break
            change = self.apply(stores, step)
            curvature = float(change.square().sum(1).double() @ self.shares.double())
            if not curvature > 0:
                break
            length = slope / curvature
            for name in names:
                solution[name] += length * step[name]
            residual -= length * change
            descent = self.transpose(stores, names, residual)
            corrected = {name: descent[name] / scale[name] for name in names}
            previous, slope = slope, _dot(descent, corrected)
            step = {n: corrected[n] + (slope / previous) * step[n] for n in names}
        return solution


def _dot(one: Stores, other: Stores) -> float:
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)
