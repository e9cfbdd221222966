"""The registry of methods: one file here a method, found by itself.

A new file in this folder with a class decorated by :func:`register` is all that a method needs:
``ec.methods()``, the sweep, the documentation's table and the tests run over the registry.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import is_dataclass

from embcompress.methods.base import Method, TableSpec

__all__ = [
    "Method",
    "TableSpec",
    "method_class",
    "method_classes",
    "methods",
    "register",
    "resolve_method",
]

_REGISTRY: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its ``name``.

    Raises:
        ValueError: the name is taken by another class.
        TypeError: the class is not a dataclass (its settings could not be compared or shown).
    """
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__name__} must be decorated with @dataclass(frozen=True)")
    known = _REGISTRY.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(f"method name {cls.name!r} is taken by {known.__qualname__}")
    _REGISTRY[cls.name] = cls
    return cls


def methods() -> dict[str, str]:
    """Every registered method: name -> one-line description."""
    return {name: cls.description() for name, cls in sorted(_REGISTRY.items())}


def method_class(name: str) -> type[Method]:
    """The class registered under ``name``.

    Raises:
        ValueError: naming the methods there are.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def method_classes() -> dict[str, type[Method]]:
    """Every registered class by its class name, such as ``QuotientRemainder``."""
    return {cls.__name__: cls for cls in _REGISTRY.values()}


def resolve_method(method: str | Method) -> Method:
    """A method object from a name (with its default settings) or from itself."""
    if isinstance(method, str):
        return method_class(method)()
    if isinstance(method, Method):
        return method
    raise TypeError(f"method must be a name or a method object, got {method!r}")


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
