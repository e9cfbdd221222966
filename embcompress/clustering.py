"""K-means, by faiss where it is installed, else by scikit-learn."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_ITERATIONS = 40
_RESTARTS = 3
#: Vectors a center that training looks at; more gain nothing that can be measured.
_SAMPLE_PER_CENTER = 256
#: Distances to all centers that are held at a time.
_DISTANCES = 1 << 22


def cluster(
    vectors: Tensor, centers: int, counts: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Centers that are near to all vectors, and the nearest center of each.

    Args:
        vectors: (n, d) float32.
        centers: k. Where there are fewer distinct vectors, the other centers are zero.
        counts: (n,) weights of the vectors, or None for equal ones.
        seed: the same one gives the same centers.

    Returns:
        (k, d) float32 and (n,) int64.

    Raises:
        ModuleNotFoundError: neither faiss nor scikit-learn is installed.
    """
    distinct, labels = torch.unique(vectors, dim=0, return_inverse=True)
    result = torch.zeros(centers, vectors.shape[1])
    if len(distinct) <= centers:
        result[: len(distinct)] = distinct
        return result, labels
    weights = torch.ones(len(vectors)) if counts is None else counts.float().cpu() + 1e-3
    sample, sample_weights = _sample(vectors, weights, centers * _SAMPLE_PER_CENTER, seed)
    if importlib.util.find_spec("faiss") is not None:
        return _faiss(vectors, sample, sample_weights, centers, seed)
    if importlib.util.find_spec("sklearn") is not None:
        return _scikit_learn(vectors, sample, sample_weights, centers, seed)
    raise ModuleNotFoundError(
        "k-means needs faiss or scikit-learn; pip install embcompress[quantize]"
    )


def nearest(vectors: Tensor, centers: Tensor) -> Tensor:
    """(N,) the row of the centers nearest to each vector, the first of equal ones."""
    centers = centers.float()
    lengths = centers.square().sum(1)
    chunks = vectors.split(max(1, _DISTANCES // len(centers)))
    return torch.cat(
        [torch.addmm(lengths, each, centers.t(), alpha=-2).argmin(1) for each in chunks]
    )


def _sample(vectors: Tensor, weights: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    if len(vectors) <= size:
        return vectors, weights
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(vectors), generator=generator)[:size]
    return vectors[chosen], weights[chosen]


def _faiss(
    vectors: Tensor, sample: Tensor, weights: Tensor, centers: int, seed: int
) -> tuple[Tensor, Tensor]:
    import faiss

    kmeans = faiss.Kmeans(
        vectors.shape[1],
        centers,
        niter=_ITERATIONS,
        nredo=_RESTARTS,
        seed=seed % 2**31 or 1,
        min_points_per_centroid=1,
        max_points_per_centroid=2 * _SAMPLE_PER_CENTER,
    )
    kmeans.train(sample.contiguous().numpy(), weights=weights.contiguous().numpy())
    _, nearest = kmeans.index.search(vectors.contiguous().numpy(), 1)
    return torch.from_numpy(kmeans.centroids), torch.from_numpy(nearest[:, 0]).long()


def _scikit_learn(
    vectors: Tensor, sample: Tensor, weights: Tensor, centers: int, seed: int
) -> tuple[Tensor, Tensor]:
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(centers, random_state=seed % 2**31, batch_size=4096, n_init=_RESTARTS)
    kmeans.fit(sample.numpy(), sample_weight=weights.numpy())
    found = torch.from_numpy(kmeans.cluster_centers_).float()
    return found, torch.from_numpy(kmeans.predict(vectors.numpy())).long()
