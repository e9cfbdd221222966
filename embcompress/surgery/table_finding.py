"""The embedding tables of a model, and which of them can be swapped."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType

from torch import Tensor, nn
from torch.nn.utils import parametrize

from embcompress.memory import storage_key
from embcompress.methods import Method, resolve_method
from embcompress.modules import Embedding, EmbeddingBag
from embcompress.tables.compressed_table import CompressedTable

MethodChoice = str | Method
TABLES = (nn.Embedding, nn.EmbeddingBag, Embedding, EmbeddingBag)


@dataclass
class Candidate:
    """Tables with one weight, and every path that leads to them."""

    modules: dict[nn.Module, list[str]]
    weight: Tensor
    refusal: str = ""
    method: Method | None = None

    @property
    def paths(self) -> list[str]:
        return [path for paths in self.modules.values() for path in paths]

    @property
    def first(self) -> nn.Module:
        return next(iter(self.modules))


def torchrec_swapping() -> ModuleType | None:
    """What there is to do about TorchRec's collections; None where no model can have any."""
    if "torchrec.modules.embedding_modules" not in sys.modules:
        return None
    return importlib.import_module("embcompress.torchrec.swapping")


def find_candidates(model: nn.Module) -> list[Candidate]:
    """Tables grouped by the storage of their weight."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_table(module):
            paths.setdefault(module, []).append(path)
    groups: dict[tuple[str, int], Candidate] = {}
    for module, names in paths.items():
        weight = _dense_weight(module)
        group = groups.setdefault(storage_key(weight), Candidate({}, weight))
        group.modules[module] = names
    owners = _parameter_owners(model)
    torchrec = torchrec_swapping()
    refused = {} if torchrec is None else torchrec.refusals(model)
    for key, group in groups.items():
        # A parametrized weight is computed anew at every access, and nothing owns it.
        group.refusal = _refusal(group, owners.get(key, []), refused)
    return list(groups.values())


def _is_table(module: nn.Module) -> bool:
    if isinstance(module, CompressedTable):
        return module.plan.is_dense
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _dense_weight(module: nn.Module) -> Tensor:
    if isinstance(module, CompressedTable):
        return next(iter(module.stores().values()))
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _parameter_owners(model: nn.Module) -> dict[tuple[str, int], list[tuple[nn.Module, str]]]:
    """Every (module, parameter path) that holds each storage."""
    owners: dict[tuple[str, int], list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            full_name = f"{path}.{name}" if path else name
            owners.setdefault(storage_key(tensor), []).append((module, full_name))
    return owners


def _refusal(
    group: Candidate, owners: list[tuple[nn.Module, str]], refused: Mapping[nn.Module, str]
) -> str:
    """Why the tables of a group cannot be swapped; empty if they can.

    ``refused`` are tables that cannot for what they are in.
    """
    outside = [name for module, name in owners if module not in group.modules]
    if outside:
        return f"tied to {', '.join(outside)}"
    shapes = {tuple(_dense_weight(module).shape) for module in group.modules}
    if len(shapes) > 1:
        return "tied to a table of another shape"
    reasons = [
        reason
        for module in group.modules
        if (reason := refused.get(module) or _module_refusal(module))
    ]
    return reasons[0] if reasons else ""


def _module_refusal(module: nn.Module) -> str:
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if _dense_weight(module).numel() == 0:
        return "it has no rows or no columns"
    if type(module) not in TABLES:
        return f"{type(module).__name__} is a subclass that may compute something else"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "it has hooks"
    options = module.options if isinstance(module, CompressedTable) else module
    if options.max_norm is not None:
        return "max_norm needs the dense table"
    if options.scale_grad_by_freq:
        return "scale_grad_by_freq needs the dense table"
    if not _dense_weight(module).requires_grad:
        return "its weight is frozen, and would become random"
    if not _dense_weight(module).is_floating_point():
        return "its weight is not floating point"
    return ""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def choose_methods(
    candidates: list[Candidate], method: MethodChoice | Mapping[str, MethodChoice]
) -> None:
    patterns = method if isinstance(method, Mapping) else {"*": method}
    resolved = {pattern: resolve_method(choice) for pattern, choice in patterns.items()}
    unused = set(resolved)
    for candidate in candidates:
        matching = [p for p in resolved if any(fnmatchcase(path, p) for path in candidate.paths)]
        unused -= set(matching)
        if matching:
            candidate.method = resolved[matching[0]]
        elif not candidate.refusal:
            candidate.refusal = "no pattern matches"
    if unused:
        paths = [path for candidate in candidates for path in candidate.paths]
        raise ValueError(f"patterns {sorted(unused)} match no table; tables: {paths}")
    if all(candidate.refusal for candidate in candidates):
        reasons = "; ".join(f"{c.paths[0]}: {c.refusal}" for c in candidates)
        raise ValueError(f"no table can be compressed: {reasons}")
