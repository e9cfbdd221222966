"""Hash keys of a plan: which plans differ in nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from embcompress.plan import Address, Code, Hash, LookupPlan, MurmurHash, Probe, Scale, Sign, Weight

AnyAddress = TypeVar("AnyAddress", bound=Address)


def without_keys(plan: LookupPlan) -> LookupPlan:
    """The plan with all keys of hashes and signs, and all Murmur seeds, zero."""
    return replace(plan, probes=tuple(_probe(probe) for probe in plan.probes))


def with_keys_of(plan: LookupPlan, other: LookupPlan) -> LookupPlan | None:
    """The plan with the keys of another one that reads stores of the same names and shapes.

    Returns:
        None where the probes differ in more than their keys.
    """
    shapes = [[(s.name, s.rows, s.width) for s in each.stores] for each in (plan, other)]
    if shapes[0] != shapes[1] or without_keys(plan).probes != without_keys(other).probes:
        return None
    return replace(plan, probes=other.probes)


def _probe(probe: Probe) -> Probe:
    return replace(probe, address=_address(probe.address), scale=_scale(probe.scale))


def _scale(scale: Scale | None) -> Scale | None:
    if isinstance(scale, Sign):
        return Sign(0)
    if isinstance(scale, Weight):
        return replace(scale, address=_address(scale.address))
    return scale


def _address(address: AnyAddress) -> AnyAddress:
    if isinstance(address, Hash):
        return replace(address, key=0)
    if isinstance(address, MurmurHash):
        return replace(address, seed=0)
    if isinstance(address, Code):
        otherwise = None if address.otherwise is None else _address(address.otherwise)
        return replace(address, row=_address(address.row), otherwise=otherwise)
    return address
