"""Start values of plans whose head is not linear: cores of tensor trains, layers of networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embcompress.plan import Network, Store, TensorTrain

#: E[z²] of a normal number z whose |z| is above 2.
_SQUARE_BEYOND_TWO = 5.74643
#: E[mish(z)²] of a normal number z.
_MISH_SQUARE = 0.4523
#: E[z²] of an even number z in [-1, 1]: what hash features are.
_FEATURE_SQUARE = 1 / 3


def draw_core(train: TensorTrain, core: Tensor, std: float) -> None:
    """Numbers of a core, so that those of the product have this deviation.

    A number of the product is a sum of independent products, one for each path through the ranks.
    Products of several normal numbers are almost all near 0, with a few large ones; so numbers
    within two deviations of 0 are drawn again ("sampled Gaussian" of Yin et al., "TT-Rec", MLSys
    2021, section 3.2).
    """
    paths = math.prod(train.ranks)
    deviation = (std / paths**0.5) ** (1 / len(train.widths))
    share = torch.rand(core.shape, dtype=torch.float64, device=core.device)
    least = math.erf(2 / 2**0.5)
    magnitude = 2**0.5 * torch.special.erfinv(least + (1 - least) * share)
    sign = 1 - 2 * torch.randint(0, 2, core.shape, device=core.device)
    core.copy_(sign * magnitude * (deviation / _SQUARE_BEYOND_TWO**0.5))


def draw_layer(network: Network, store: Store, tensor: Tensor, std: float) -> None:
    """Weights with which sums have variance 1, and the last ones deviation ``std``; no biases."""
    if store.name in network.biases:
        tensor.zero_()
        return
    is_first, is_last = store.name == network.weights[0], store.name == network.weights[-1]
    square = _MISH_SQUARE
    if is_first:
        square = 1.0 if network.inputs is None else _FEATURE_SQUARE
    tensor.normal_(0.0, (std if is_last else 1.0) / (store.width * square) ** 0.5)
