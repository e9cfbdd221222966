"""Every rule of a plan, its JSON, its bytes and how it prints."""

from __future__ import annotations

import ast
import inspect
import sys
from types import ModuleType

import pytest

from embcompress.plan import (
    Digit,
    LookupPlan,
    PlanError,
    Probe,
    Store,
    addresses,
    consistency,
    heads,
    probes,
    serialization,
    stores,
)
from tests.engine.broken_plans import BROKEN, HOSTILE
from tests.plan_cases import make_case, packed_sparse


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_raises(rule: str) -> None:
    make, words = BROKEN[rule]
    with pytest.raises(PlanError, match=words):
        make()


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_json_raises(what: str) -> None:
    text, words = HOSTILE[what]
    with pytest.raises(PlanError, match=words):
        LookupPlan.from_json(text)


@pytest.mark.parametrize(
    "module",
    [addresses, consistency, heads, probes, serialization, stores],
    ids=lambda module: module.__name__,
)
def test_every_rule_has_a_failing_example(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of all ``require(…)`` calls are those that the examples break."""
    rules = {
        node.lineno
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "require"
    }
    broken = set()

    def require(condition: bool, message: str) -> None:
        if not condition:
            # The line where the statement of a call that spans several begins.
            line = sys._getframe(1).f_lineno
            broken.add(max(rule for rule in rules if rule <= line))
            raise PlanError(message)

    monkeypatch.setattr(module, "require", require)
    for make, _ in BROKEN.values():
        with pytest.raises(PlanError):
            make()
    for text, _ in HOSTILE.values():
        with pytest.raises(PlanError):
            LookupPlan.from_json(text)
    assert broken == rules


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_generated_plans_round_trip(first: int) -> None:
    for number in range(first, first + 100):
        plan = make_case(number).plan
        assert LookupPlan.from_json(plan.to_json()) == plan
        assert LookupPlan.from_json(plan.to_json(indent=2)) == plan
        assert hash(plan) == hash(LookupPlan.from_json(plan.to_json()))


def test_a_sum_is_placed_in_columns() -> None:
    two, three = Store("two", 5, 2), Store("three", 5, 3)
    probes = (
        Probe("three", Digit(1, 5)),
        Probe("two", Digit(1, 5), column=3),
        Probe("two", Digit(2, 5), column=2),
    )
    plan = LookupPlan(10, 5, (two, three), probes)
    assert plan.columns == ((0, 3), (3, 5), (2, 4))
    assert plan.width == 5
    assert LookupPlan.from_json(plan.to_json()) == plan
    assert "three[x mod 5] + two[x mod 5]→3 + two[x div 2 mod 5]→2" in str(plan)


def test_generated_plans_print_what_they_read() -> None:
    for number in range(200):
        plan = make_case(number).plan
        assert all(probe.store in str(plan) for probe in plan.probes)
        assert all(name in str(plan) for name in plan.head_stores)
        assert plan.bytes == sum(store.bytes for store in plan.stores)


def test_bytes_are_those_of_the_tensors() -> None:
    for number in range(200):
        case = make_case(number)
        sparse_stores = {s.name for s in case.plan.stores if s.sparsity is not None}
        if sparse_stores != packed_sparse(case):  # latents, in training
            continue
        assert case.plan.bytes == sum(t.numel() * t.element_size() for t in case.stores.values())
