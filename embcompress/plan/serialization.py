"""Lookup plans as JSON, decoded strictly: nothing unknown, nothing missing, nothing coerced."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import Any

from embcompress.plan import (
    Code,
    Digit,
    Hash,
    HashFeatures,
    Linear,
    LookupPlan,
    MurmurHash,
    Network,
    PlanError,
    Probe,
    Quantization,
    Sign,
    Slot,
    Sparsity,
    Store,
    TensorTrain,
    Weight,
    require,
)

FORMAT = 1

_KINDS: dict[str, type] = {
    cls.kind: cls
    for cls in (Digit, Hash, MurmurHash, Code, Slot, Sign, Weight, Linear, TensorTrain, Network)
}
_DIRECT = (Digit, Hash, MurmurHash)
_HEADS = (Linear, TensorTrain, Network)


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        encoded = {field.name: _encode(getattr(value, field.name)) for field in fields(value)}
        kind = getattr(type(value), "kind", None)
        return encoded if kind is None else {"kind": kind, **encoded}
    return value


def _decode(cls: type, data: Any, **nested: Any) -> Any:
    """Build dataclass ``cls`` from a JSON object; ``nested`` decodes the fields it names."""
    require(isinstance(data, dict), f"expected an object for {cls.__name__}, got {data!r}")
    known = {field.name: field for field in fields(cls)}
    unknown = set(data) - set(known) - ({"kind"} if hasattr(cls, "kind") else set())
    require(not unknown, f"{cls.__name__} has no field {sorted(unknown)}")
    arguments = {}
    for name, value in data.items():
        if name == "kind":
            continue
        if name in nested:
            arguments[name] = nested[name](value)
        else:
            _check_scalar(cls, name, str(known[name].type), value)
            arguments[name] = value
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in arguments]
    require(not missing, f"{cls.__name__} lacks {missing}")
    return cls(**arguments)


_SCALARS = {
    "int": int,
    "str": str,
    "bool": bool,
    "Combine": str,
    "Pool": str,
    "SparsityForm": str,
    "Location": str,
}


def _check_scalar(cls: type, name: str, annotation: str, value: Any) -> None:
    base, _, optional = annotation.partition(" | ")
    if value is None and optional == "None":
        return
    right = isinstance(value, _SCALARS[base]) and isinstance(value, bool) == (base == "bool")
    require(right, f"{cls.__name__}.{name} must be {annotation}, got {value!r}")


def _decode_kind(data: Any, *allowed: type, optional: bool = False) -> Any:
    if data is None and optional:
        return None
    kind = data.get("kind") if isinstance(data, dict) else None
    require(isinstance(kind, str) and kind in _KINDS, f"unknown kind in {data!r}")
    cls = _KINDS[str(kind)]
    require(cls in allowed, f"{cls.__name__} is not allowed here")
    return _decode(
        cls,
        data,
        row=lambda value: _decode_kind(value, *_DIRECT),
        bucket=lambda value: _decode_kind(value, *_DIRECT),
        tag=lambda value: _decode_kind(value, *_DIRECT),
        address=lambda value: _decode_kind(value, *_DIRECT, Code, Slot),
        otherwise=lambda value: _decode_kind(value, *_DIRECT, Code, Slot, optional=True),
        widths=lambda value: _decode_scalars(value, int),
        ranks=lambda value: _decode_scalars(value, int),
        weights=lambda value: _decode_scalars(value, str),
        biases=lambda value: _decode_scalars(value, str),
        inputs=lambda value: None if value is None else _decode(HashFeatures, value),
    )


def _decode_scalars(data: Any, kind: type) -> tuple[Any, ...]:
    def decode(value: Any) -> Any:
        right = isinstance(value, kind) and not isinstance(value, bool)
        require(right, f"expected {kind.__name__} in a list, got {value!r}")
        return value

    return _decode_list(data, decode)


def _decode_list(data: Any, decode: Any) -> tuple[Any, ...]:
    require(isinstance(data, list), f"expected a list, got {data!r}")
    return tuple(decode(item) for item in data)


def _decode_store(data: Any) -> Store:
    def quantization(value: Any) -> Quantization | None:
        return None if value is None else _decode(Quantization, value)

    def sparsity(value: Any) -> Sparsity | None:
        return None if value is None else _decode(Sparsity, value)

    return _decode(Store, data, quantization=quantization, sparsity=sparsity)


def _decode_probe(data: Any) -> Probe:
    return _decode(
        Probe,
        data,
        address=lambda value: _decode_kind(value, *_DIRECT, Code, Slot),
        scale=lambda value: _decode_kind(value, Sign, Weight, optional=True),
    )


def _decode_plan_fields(data: dict[str, Any]) -> LookupPlan:
    return _decode(
        LookupPlan,
        data,
        stores=lambda value: _decode_list(value, _decode_store),
        probes=lambda value: _decode_list(value, _decode_probe),
        head=lambda value: _decode_kind(value, *_HEADS, optional=True),
    )


def encode_plan(plan: LookupPlan, indent: int | None = None) -> str:
    """See :meth:`LookupPlan.to_json`."""
    return json.dumps({"format": FORMAT, **_encode(plan)}, indent=indent)


def decode_plan(text: str) -> LookupPlan:
    """See :meth:`LookupPlan.from_json`."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: an integer of too many digits, too
        raise PlanError(f"not JSON: {error}") from None
    require(isinstance(data, dict), f"a plan is a JSON object, not {type(data).__name__}")
    version = data.pop("format", None)
    right = isinstance(version, int) and not isinstance(version, bool) and version == FORMAT
    require(right, f"plan format {version!r}; this version reads {FORMAT}")
    return _decode_plan_fields(data)
