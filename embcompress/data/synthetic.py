"""A synthetic click log: power-law ids, drift over time, and a planted teacher.

The teacher gives every id of every feature a latent vector (computed from a counter, never
stored), so that an id's identity matters: ids that share a row cost accuracy. The teacher's own
AUC and log-loss are the noise ceiling that no model can pass, and are kept in the meta data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embcompress.data.click_log import ClickLog, ClickLogWriter, Feature
from embcompress.data.progress import RowProgress

_CHUNK = 1 << 16
_LATENT = 4
_SCORED_ROWS = 1 << 20


@dataclass(frozen=True)
class SyntheticSettings:
    """Parameters of the synthetic click log.

    Attributes:
        rows: number of rows, in time order.
        ids: number of ids of all features together; the features' sizes are spread
            geometrically, and the largest takes what remains.
        features: number of features with one id a row.
        bag_length: mean length of the one bag feature's bags (0: no bag feature).
        dense: number of numeric features, standard normal.
        exponent: a of the power law, P(rank r) ∝ (r + 1)**-a.
        drift: over the whole log, every feature's popularity ranks move on by this share of its
            ids, so that late rows see ids that early rows did not.
        strength: standard deviation of the teacher's logit.
        seed: of everything.
    """

    rows: int = 200_000
    ids: int = 10_000
    features: int = 4
    bag_length: float = 3.0
    dense: int = 4
    exponent: float = 1.05
    drift: float = 0.1
    strength: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 10 or self.features < 1 or self.ids < 20 * self.features:
            raise ValueError(
                "the synthetic log needs rows >= 10, features >= 1 and ids >= 20 * features, "
                f"got {self}"
            )
        if self.dense < 0 or not 0 <= self.bag_length <= 1000:
            raise ValueError(f"dense must be >= 0 and bag_length in [0, 1000], got {self}")
        if not (0 <= self.drift <= 1 and self.exponent > 0 and self.strength > 0):
            raise ValueError(f"drift in [0, 1], exponent > 0 and strength > 0, got {self}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of ids of each feature, the bag feature's last."""
        count = self.features + (self.bag_length > 0)
        shares = np.geomspace(1, max(2.0, self.ids / (20 * count)), count)
        sizes = np.maximum(10, (shares / shares.sum() * self.ids).astype(int))
        sizes[-1] += self.ids - sizes.sum()
        # The bag feature is of middling size; the largest table has one id a row.
        order = np.roll(sizes[::-1], -(count // 2)) if self.bag_length > 0 else sizes
        return tuple(int(size) for size in order)


def _ranks(uniform: NDArray[np.float64], size: int, exponent: float) -> NDArray[np.int64]:
    """Power-law ranks in ``[0, size)`` by the inverse of the continuous distribution."""
    if abs(exponent - 1) < 1e-9:
        values = (size + 1.0) ** uniform
    else:
        power = 1.0 - exponent
        values = (1.0 + uniform * ((size + 1.0) ** power - 1.0)) ** (1.0 / power)
    return np.clip(values.astype(np.int64) - 1, 0, size - 1)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(multiplier)
    return values ^ (values >> np.uint64(31))


def latent_vectors(ids: NDArray[np.int64], feature: int, seed: int) -> NDArray[np.float64]:
    """(n, 4) standard normal vectors of ids, from a counter: the same whenever they are asked."""
    base = np.uint64((seed * 1_000_003 + feature) & 0xFFFFFFFF) << np.uint64(32)
    counter = _mix(ids.astype(np.uint64) + _mix(np.array([base]))[0])
    columns = counter[:, None] + np.arange(2 * _LATENT, dtype=np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    uniform = (_mix(columns) >> np.uint64(11)).astype(np.float64) / 2.0**53
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:, :_LATENT]))
    return radius * np.cos(2.0 * np.pi * uniform[:, _LATENT:])


class _Teacher:
    """Draws rows and knows their true probabilities."""

    def __init__(self, settings: SyntheticSettings) -> None:
        self.settings = settings
        rng = np.random.default_rng([settings.seed, 0])
        self.dense_weights = rng.normal(size=settings.dense)
        count = len(settings.sizes)
        self.scale = settings.strength / np.sqrt(count + count * (count - 1) / 2 + settings.dense)

    def draw(self, start: int, count: int) -> dict[str, NDArray[np.generic]]:
        """Columns of rows ``start`` to ``start + count``."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, 1, start])
        moment = (start + np.arange(count)) / settings.rows
        dense = rng.normal(size=(count, settings.dense))
        single, vectors = [], []
        lengths = np.zeros(count, np.int64)
        bag_ids = np.empty(0, np.int64)
        for feature, size in enumerate(settings.sizes):
            if feature == settings.features:
                lengths = rng.poisson(settings.bag_length, count).astype(np.int64)
                rows = np.repeat(np.arange(count), lengths)
                bag_ids = self._ids(rng, moment[rows], size)
                vectors.append(self._pooled(bag_ids, rows, lengths, feature))
            else:
                single.append(self._ids(rng, moment, size))
                vectors.append(latent_vectors(single[-1], feature, settings.seed))
        probability = 1.0 / (1.0 + np.exp(-self._logit(vectors, dense)))
        return {
            "label": (rng.random(count) < probability).astype(np.uint8),
            "dense": dense.astype(np.float32),
            "ids": np.stack(single, axis=1),
            "bag_ids": bag_ids,
            "bag_lengths": lengths,
            "probability": probability,
        }

    def _ids(
        self, rng: np.random.Generator, moment: NDArray[np.float64], size: int
    ) -> NDArray[np.int64]:
        ranks = _ranks(rng.random(len(moment)), size, self.settings.exponent)
        return (ranks + (self.settings.drift * size * moment).astype(np.int64)) % size

    def _pooled(
        self,
        ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        lengths: NDArray[np.int64],
        feature: int,
    ) -> NDArray[np.float64]:
        """Sum over the bag, scaled back to unit variance."""
        pooled = np.zeros((len(lengths), _LATENT))
        np.add.at(pooled, rows, latent_vectors(ids, feature, self.settings.seed))
        return pooled / np.sqrt(np.maximum(lengths, 1))[:, None]

    def _logit(
        self, vectors: list[NDArray[np.float64]], dense: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        stacked = np.stack(vectors)
        first_order = stacked[:, :, 0].sum(axis=0)
        total = stacked.sum(axis=0)
        pairs = 0.5 * ((total**2).sum(axis=1) - (stacked**2).sum(axis=(0, 2)))
        logit = first_order + pairs / np.sqrt(_LATENT) + dense @ self.dense_weights
        return self.scale * logit


def prepare_synthetic(
    settings: SyntheticSettings, target: Path, *, progress: bool = True
) -> ClickLog:
    """Draw a synthetic click log."""
    teacher, sizes = _Teacher(settings), settings.sizes
    bag = settings.features if settings.bag_length > 0 else None
    features = tuple(
        Feature("bag" if number == bag else f"id_{number}", size, number == bag)
        for number, size in enumerate(sizes)
    )
    starts = range(0, settings.rows, _CHUNK)
    counts = [min(_CHUNK, settings.rows - start) for start in starts]
    parts, probabilities = [], []
    with RowProgress("drawing rows", settings.rows, visible=progress) as bar:
        for start, count in zip(starts, counts, strict=True):
            rows = teacher.draw(start, count)
            probabilities.append((rows.pop("probability"), rows["label"]))
            parts.append(rows)
            bar.advance(count, count)
    num_bag_ids = sum(len(rows["bag_ids"]) for rows in parts)
    writer = ClickLogWriter(
        target, name="synthetic", features=features, rows=settings.rows,
        dense_names=tuple(f"number_{i}" for i in range(settings.dense)),
        bag_ids={} if bag is None else {bag: num_bag_ids},
    )  # fmt: skip
    next_id = 0
    for start, rows in zip(starts, parts, strict=True):
        writer.write(start, label=rows["label"], dense=rows["dense"], ids=rows["ids"])
        if bag is not None:
            next_id = writer.write_bag(bag, start, next_id, rows["bag_ids"], rows["bag_lengths"])
    return writer.finish(settings=asdict(settings), malformed=0, **_ceiling(probabilities))


def _ceiling(
    parts: list[tuple[NDArray[np.generic], NDArray[np.generic]]],
) -> dict[str, float]:
    """The teacher's own AUC and log-loss, over the last rows."""
    from sklearn.metrics import log_loss, roc_auc_score

    probability = np.concatenate([part for part, _ in parts])[-_SCORED_ROWS:]
    label = np.concatenate([part for _, part in parts])[-_SCORED_ROWS:]
    return {
        "teacher_auc": float(roc_auc_score(label, probability)),
        "teacher_logloss": float(log_loss(label, probability)),
    }
