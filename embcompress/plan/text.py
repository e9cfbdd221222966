"""Plans in one line of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcompress.plan.addresses import Address, Digit, Hash, MurmurHash, Slot
from embcompress.plan.heads import Head, Linear, TensorTrain
from embcompress.plan.probes import Probe, Sign, Weight
from embcompress.plan.stores import Store

if TYPE_CHECKING:
    from embcompress.plan.lookup_plan import LookupPlan


def plan_text(plan: LookupPlan) -> str:
    """Size and bytes, the formula of a vector, and the stores."""
    sign = {"sum": " + ", "mul": " × ", "concat": " ‖ "}[plan.combine]
    formula = sign.join(_probe_text(probe) for probe in plan.probes)
    if plan.head is not None:
        formula = _head_text(plan.head, formula)
    if plan.pool != "none":
        formula = f"{plan.pool} over ids of {formula}"
    stores = ", ".join(_store_text(store) for store in plan.stores)
    beside = f" and {plan.offloaded} in files" if plan.offloaded else ""
    return (
        f"{plan.num_embeddings} × {plan.embedding_dim} in {plan.bytes} bytes{beside}: "
        f"{formula}  [{stores}]"
    )


def _store_text(store: Store) -> str:
    apart = "" if store.stride is None else f" every {store.stride}"
    text = f"{store.name} {store.rows}×{store.width}{apart} {store.dtype}"
    if store.is_in_file:
        text += " in a file"
    return text if store.sparsity is None else f"{text}, {store.sparsity.stored} kept"


def _address_text(address: Address) -> str:
    if isinstance(address, Digit):
        if address.divisor == 1:
            return f"x mod {address.radix}"
        return f"x div {address.divisor} mod {address.radix}"
    if isinstance(address, Hash):
        return f"hash_{address.key & 0xFFFF:04x}(x) of {address.buckets}"
    if isinstance(address, MurmurHash):
        return f"murmur_{address.seed}(x)[{address.word}] mod {address.buckets}"
    if isinstance(address, Slot):
        text = f"slot of {_address_text(address.tag)} in {address.store}"
        text += f"[{_address_text(address.bucket)}]"
        if address.first:
            text = f"{address.first} + {text}"
        return (
            text if address.otherwise is None else f"{text} or {_address_text(address.otherwise)}"
        )
    text = f"{address.store}[{_address_text(address.row)}, {address.column}]"
    if address.first:
        text += f" - {address.first}"
    return text if address.otherwise is None else f"{text} or {_address_text(address.otherwise)}"


def _head_text(head: Head, formula: str) -> str:
    if isinstance(head, Linear):
        return f"{head.weight} @ ({formula})"
    if isinstance(head, TensorTrain):
        shapes = " · ".join("×".join(map(str, shape)) for shape in head.shapes)
        return f"train {shapes} of ({formula})"
    if head.inputs is not None:
        formula = f"{head.inputs.count} hash features of x"
    return f"network {', '.join(head.weights)} of ({formula})"


def _probe_text(probe: Probe) -> str:
    offset = f"{probe.offset} + " if probe.offset else ""
    row = f"{probe.store}[{offset}{_address_text(probe.address)}]"
    if probe.column is not None:
        row += f"→{probe.column}"
    if isinstance(probe.scale, Sign):
        return f"±{row}"
    if isinstance(probe.scale, Weight):
        scale = probe.scale
        return f"{scale.store}[{_address_text(scale.address)}, {scale.column}]·{row}"
    return row
