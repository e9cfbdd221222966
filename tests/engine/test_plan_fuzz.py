"""Plans as JSON that comes from anywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embcompress.plan import (
    LookupPlan,
    PlanError,
)
from tests.plan_cases import make_case

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["digit", "hash", "code", "sign", "weight", "linear", "rows", "store_0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = data.keys() if isinstance(data, dict) else range(len(data))
    found = []
    for key in keys:
        found.append((data, key))
        if isinstance(data[key], dict | list):
            found += places(data[key])
    return found


def read_or_refuse(text: str) -> None:
    try:
        plan = LookupPlan.from_json(text)
    except PlanError:
        return
    assert LookupPlan.from_json(plan.to_json()) == plan


@settings(deadline=None, max_examples=600)
@given(number=st.integers(0, 10_000), data=st.data())
def test_a_mutated_plan_is_read_or_refused(number: int, data: st.DataObject) -> None:
    mutant = json.loads(make_case(number, small=True).plan.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(mutant)))
        change = data.draw(st.sampled_from(["replace", "delete", "add", "copy"]))
        if change == "replace":
            container[key] = data.draw(ANY_JSON)
        elif change == "delete":
            del container[key]
        elif change == "copy":
            other, other_key = data.draw(st.sampled_from(places(mutant)))
            container[key] = json.loads(json.dumps(other[other_key]))
        elif isinstance(container, dict):
            container[data.draw(st.text(max_size=6))] = data.draw(ANY_JSON)
        else:
            container.append(data.draw(ANY_JSON))
        if not places(mutant):
            break
    read_or_refuse(json.dumps(mutant))


@settings(deadline=None, max_examples=300)
@given(
    number=st.integers(0, 10_000),
    position=st.floats(0, 1, exclude_max=True),
    length=st.integers(0, 4),
    inserted=st.text(max_size=4) | st.sampled_from(['"', "{", "}", "[", "]", ",", ":", "0", "-"]),
)
def test_a_mutated_text_is_read_or_refused(
    number: int, position: float, length: int, inserted: str
) -> None:
    text = make_case(number, small=True).plan.to_json()
    start = int(position * len(text))
    read_or_refuse(text[:start] + inserted + text[start + length :])


@settings(deadline=None, max_examples=200)
@given(st.text() | ANY_JSON.map(json.dumps))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        LookupPlan.from_json(text)
