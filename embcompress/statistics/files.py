"""Profiles on disk: one safetensors file with JSON in its header.

Nothing is unpickled. A file is checked in this order: safetensors' own header and offsets; the
JSON, every number of it against its limits; the name, dtype and shape of every tensor against what
the JSON calls for; only then are tensors read, compared with the file's digest, and checked for
what the code relies on.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from embcompress.statistics.counter import ExactCounter, SketchCounter
from embcompress.statistics.feature import SIZE_BINS, FeatureProfile
from embcompress.statistics.profiles import Profile
from embcompress.statistics.settings import ProfileSettings

FORMAT = "embcompress.profile"
VERSION = 1
_DTYPES = {"I64": np.int64, "U64": np.uint64, "U8": np.uint8, "BOOL": np.bool_}
_MOST_FEATURES = 100_000

Arrays = dict[str, NDArray[Any]]
#: dtype of safetensors, and for each dimension its size, or the largest that it may have, negated.
Shape = tuple[str, tuple[int, ...]]


class ProfileFileError(ValueError):
    """A file that is no profile, is damaged, or is of another version."""


def _safetensors() -> Any:
    try:
        import safetensors.numpy as safetensors_numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "profiles are saved with safetensors; pip install 'embcompress[files]'",
            name=error.name,
        ) from error
    return safetensors_numpy


# ----------------------------------------------------------------------------------------- saving


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a profile, aside and then renamed: a file that was there stays whole until then.

    Raises:
        ModuleNotFoundError: safetensors is missing; names the extra.
        OSError: the file cannot be written.
    """
    library = _safetensors()
    profile.flush()
    arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(profile).items()}
    description = json.dumps(_description(profile), allow_nan=False)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "profile": description,
        "digest": _digest(description, arrays),
    }
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=target.name, suffix=".partial", dir=target.parent)
    os.close(handle)
    try:
        library.save_file(arrays, name, metadata)
        _keep_mode(name)
        with open(name, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _keep_mode(name: str) -> None:
    """Permissions of an ordinary new file; those of temporary files are the owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)


def _description(profile: Profile) -> dict[str, Any]:
    return {
        "settings": asdict(profile.settings),
        "rows": profile.rows,
        "source": profile.source,
        "is_partial": profile.is_partial,
        "has_times": profile.slices.has_times,
        "level": profile.slices.level,
        "features": [
            {
                "name": feature.name,
                "num_embeddings": feature.num_embeddings,
                "queries": feature.queries,
                "largest_bag": feature.largest_bag,
                "is_exact": feature.is_exact,
                "heavy_error": feature.counter.heavy.error
                if isinstance(feature.counter, SketchCounter)
                else 0,
            }
            for feature in profile.features.values()
        ],
    }


def _arrays(profile: Profile) -> Arrays:
    sample = profile.row_sample
    arrays: Arrays = {
        "slices": profile.slices.keys,
        "rows.words": sample.words,
        "rows.ids": sample.ids,
        "rows.present": sample.present,
    }
    for number, feature in enumerate(profile.features.values()):
        own = {
            "bag_sizes": feature.bag_sizes,
            "histograms": feature.histograms,
            **_counter_arrays(feature),
        }
        arrays.update({f"{number}.{name}": array for name, array in own.items()})
    return arrays


def _counter_arrays(feature: FeatureProfile) -> Arrays:
    counter = feature.counter
    if isinstance(counter, ExactCounter):
        table = counter.table
        if feature.num_embeddings is None:  # without the room to grow
            seen = np.flatnonzero(table)
            table = table[: seen[-1] + 1 if len(seen) else 0]
        return {"counts": table}
    return {
        "count_min": counter.count_min.table,
        "heavy.ids": counter.heavy.ids,
        "heavy.counts": counter.heavy.counts,
        "sample.words": counter.sample.words,
        "sample.counts": counter.sample.counts,
        "registers": counter.distinct.registers,
    }


def _digest(description: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """BLAKE2b of the JSON and of every tensor's name and bytes."""
    digest = hashlib.blake2b(description.encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- loading


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile.

    Raises:
        FileNotFoundError: there is no such file.
        ProfileFileError: it is no profile, damaged, or of a newer version.
        ModuleNotFoundError: safetensors is missing; names the extra.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no profile at {os.fspath(path)}")
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            return _read(file)
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise ProfileFileError(
            f"{os.fspath(path)} is no profile, or is damaged: {error}; delete it and profile the "
            "data again"
        ) from error


def _read(file: Any) -> Profile:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"its version is {metadata.get('version')!r}, this code reads {VERSION}")
    text = _get(metadata, "profile", str)
    description = json.loads(text)
    settings = ProfileSettings(**_get(description, "settings", dict))
    _check_description(description, settings)
    shapes = _shapes(description, settings)
    _check_shapes(file, shapes)
    arrays = {name: file.get_tensor(name) for name in shapes}
    if _digest(text, arrays) != metadata.get("digest"):
        raise ValueError("its contents do not have the digest that was saved with them")
    _check_contents(arrays, description, settings)
    return _restore(arrays, description, settings)


def _get(values: Any, name: str, kind: type, low: int = 0, high: int = 2**63 - 1) -> Any:
    """A checked value of a JSON object."""
    if not isinstance(values, dict) or name not in values:
        raise ValueError(f"{name} is missing")
    value = values[name]
    if type(value) is not kind or (kind is int and not low <= cast(int, value) <= high):
        raise ValueError(f"{name} is {str(value)[:100]!r}")
    return value


def _check_description(description: Any, settings: ProfileSettings) -> None:
    for name in ("is_partial", "has_times"):
        _get(description, name, bool)
    _get(description, "rows", int)
    _get(description, "source", str)
    _get(description, "level", int, 0, 63)
    features = _get(description, "features", list)
    if not 1 <= len(features) <= _MOST_FEATURES:
        raise ValueError(f"there are {len(features)} features")
    for feature in features:
        _get(feature, "name", str)
        for name in ("queries", "largest_bag", "heavy_error"):
            _get(feature, name, int)
        exact = _get(feature, "is_exact", bool)
        size = feature.get("num_embeddings", 0)
        if size is not None:
            _get(feature, "num_embeddings", int, 1)
            if exact != (size <= settings.exact_ids):
                raise ValueError(f"feature {feature['name']!r} is not counted as its size asks for")
    if len({feature["name"] for feature in features}) < len(features):
        raise ValueError("two features have one name")


def _shapes(description: dict[str, Any], settings: ProfileSettings) -> dict[str, Shape]:
    """What tensors there must be."""
    features, rows = description["features"], -settings.sampled_rows
    shapes: dict[str, Shape] = {
        "slices": ("I64", (-settings.slices,)),
        "rows.words": ("U64", (rows,)),
        "rows.ids": ("I64", (rows, len(features))),
        "rows.present": ("BOOL", (rows, len(features))),
    }
    for number, feature in enumerate(features):
        buckets = min(settings.drift_buckets, feature["num_embeddings"] or settings.drift_buckets)
        own: dict[str, Shape] = {
            "bag_sizes": ("I64", (SIZE_BINS,)),
            "histograms": ("I64", (-settings.slices, 2, buckets)),
        }
        if feature["is_exact"]:
            own["counts"] = ("I64", (feature["num_embeddings"] or -settings.exact_ids,))
        else:
            own |= {
                "count_min": ("I64", (settings.sketch_rows, settings.sketch_columns)),
                "heavy.ids": ("I64", (-settings.heavy_hitters,)),
                "heavy.counts": ("I64", (-settings.heavy_hitters,)),
                "sample.words": ("U64", (-settings.sampled_ids,)),
                "sample.counts": ("I64", (-settings.sampled_ids,)),
                "registers": ("U8", (1 << settings.register_bits,)),
            }
        shapes.update({f"{number}.{name}": shape for name, shape in own.items()})
    return shapes


def _check_shapes(file: Any, shapes: Mapping[str, Shape]) -> None:
    names = set(file.keys())
    if names != set(shapes):
        raise ValueError(f"tensors that do not belong: {sorted(names ^ set(shapes))[:5]}")
    for name, (dtype, expected) in shapes.items():
        tensor = file.get_slice(name)
        shape = tensor.get_shape()
        fits = len(shape) == len(expected) and all(
            size == want if want >= 0 else size <= -want
            for size, want in zip(shape, expected, strict=True)
        )
        if tensor.get_dtype() != dtype or not fits:
            raise ValueError(f"tensor {name!r} is {tensor.get_dtype()} {shape}")


def _check_contents(arrays: Arrays, description: dict[str, Any], settings: ProfileSettings) -> None:
    """What the code relies on; a digest can be forged."""
    slices, words = arrays["slices"], arrays["rows.words"]
    _require(_rises(slices), "slices")
    _require(len(arrays["rows.ids"]) == len(arrays["rows.present"]) == len(words), "rows")
    _require(bool((words[1:] >= words[:-1]).all()), "rows.words")
    for number, feature in enumerate(description["features"]):
        own = {
            name.partition(".")[2]: array
            for name, array in _of_feature(arrays, number, feature["is_exact"]).items()
        }
        for name in own:
            if name not in ("heavy.ids", "sample.words", "registers"):
                _require(bool((own[name] >= 0).all()), name)
        _require(len(own["histograms"]) == len(slices), "histograms")
        _require(own["bag_sizes"].sum(dtype=np.float64) == description["rows"], "bag_sizes")
        queries = feature["queries"]
        # Sums are made of the values as floats: forged counts must not overflow into the right sum.
        totals = [own["histograms"], own["counts"] if feature["is_exact"] else own["count_min"][0]]
        for total in totals:
            _require(abs(total.sum(dtype=np.float64) - queries) <= 1e-9 * queries, "queries")
        if not feature["is_exact"]:
            for keys, counts in (("heavy.ids", "heavy.counts"), ("sample.words", "sample.counts")):
                _require(len(own[keys]) == len(own[counts]) and _rises(own[keys]), keys)
            _require(int(own["registers"].max()) <= 65 - settings.register_bits, "registers")


def _of_feature(arrays: Arrays, number: int, exact: bool) -> Arrays:
    names = ["bag_sizes", "histograms"]
    if exact:
        names.append("counts")
    else:
        names += ["count_min", "registers"]
        names += ["heavy.ids", "heavy.counts", "sample.words", "sample.counts"]
    return {f"{number}.{name}": arrays[f"{number}.{name}"] for name in names}


def _rises(values: NDArray[Any]) -> bool:
    return bool((values[1:] > values[:-1]).all())


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"{name} holds values that no profile has")


def _restore(arrays: Arrays, description: dict[str, Any], settings: ProfileSettings) -> Profile:
    features = description["features"]
    profile = Profile(
        {feature["name"]: feature["num_embeddings"] for feature in features},
        settings,
        has_times=description["has_times"],
    )
    profile.rows, profile.source = description["rows"], description["source"]
    profile.is_partial = description["is_partial"]
    profile.slices.level, profile.slices.keys = description["level"], arrays["slices"]
    profile.row_sample.restore(arrays["rows.words"], arrays["rows.ids"], arrays["rows.present"])
    for number, (saved, feature) in enumerate(
        zip(features, profile.features.values(), strict=True)
    ):
        _restore_feature(
            feature,
            saved,
            {
                name.partition(".")[2]: array
                for name, array in _of_feature(arrays, number, saved["is_exact"]).items()
            },
        )
    return profile


def _restore_feature(feature: FeatureProfile, saved: dict[str, Any], own: Arrays) -> None:
    feature.queries, feature.largest_bag = saved["queries"], saved["largest_bag"]
    feature.bag_sizes = own["bag_sizes"]
    feature.histograms = own["histograms"]
    if saved["is_exact"]:
        assert isinstance(feature.counter, ExactCounter)
        feature.counter.table = own["counts"]
        return
    feature.use_sketch()
    counter = feature.counter
    assert isinstance(counter, SketchCounter)
    counter.count_min.table = own["count_min"]
    counter.heavy.ids, counter.heavy.counts = own["heavy.ids"], own["heavy.counts"]
    counter.heavy.error = saved["heavy_error"]
    counter.sample.words, counter.sample.counts = own["sample.words"], own["sample.counts"]
    counter.distinct.registers = own["registers"]
