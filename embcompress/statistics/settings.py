"""What a profile keeps, and so how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass, fields

#: Smallest and largest value of each setting. Files are checked against them before anything of
#: the sizes they ask for is allocated.
_LIMITS = {
    "exact_ids": (1, 2**32),
    "sketch_columns": (2**8, 2**28),
    "sketch_rows": (1, 16),
    "heavy_hitters": (16, 2**20),
    "sampled_ids": (64, 2**22),
    "register_bits": (4, 18),
    "slices": (4, 1024),
    "drift_buckets": (16, 2**20),
    "sampled_rows": (64, 2**24),
    "seed": (-(2**63), 2**63 - 1),
}
_POWERS_OF_TWO = ("sketch_columns", "drift_buckets")


@dataclass(frozen=True)
class ProfileSettings:
    """Sizes of the parts of a profile; profiles merge only where these are equal.

    A feature takes ``8 * exact_ids`` bytes at most while its counts are exact (with the defaults
    134 MB), and 8.8 MB with the defaults once they are sketched; its slices take ``16 * slices *
    drift_buckets`` bytes on top (4.2 MB), and the sampled rows 9 bytes a row and feature (0.6 MB).

    Attributes:
        exact_ids: a feature whose ids are all below this is counted exactly, 8 bytes an id.
        sketch_columns, sketch_rows: of the Count-Min sketch of the other features; the columns a
            power of two.
        heavy_hitters: counters of the Misra-Gries list.
        sampled_ids: ids of the uniform sample of distinct ids.
        register_bits: logarithm of the number of HyperLogLog registers.
        slices: time slices at most.
        drift_buckets: buckets of a slice's histogram, a power of two.
        sampled_rows: rows of the uniform sample that pairs of features are compared on.
        seed: of the hash keys.
    """

    exact_ids: int = 2**24
    sketch_columns: int = 2**18
    sketch_rows: int = 4
    heavy_hitters: int = 4096
    sampled_ids: int = 2**14
    register_bits: int = 14
    slices: int = 16
    drift_buckets: int = 2**14
    sampled_rows: int = 2**16
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), _LIMITS[field.name]
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(
                    f"{field.name} must be an integer in [{low}, {high}], got {value!r}"
                )
            if field.name in _POWERS_OF_TWO and value & (value - 1):
                raise ValueError(f"{field.name} must be a power of two, got {value}")
