"""Few, small lookups that reach every kernel: what compute-sanitizer runs, which is slow."""

from __future__ import annotations

from functools import partial

import pytest

from embcompress.engine import ops
from tests.engine.devices import DEVICES
from tests.engine.judging import Judge, run
from tests.engine.test_generated import engine, run_features
from tests.plan_cases import make_case, make_feature_cases

pytestmark = [
    pytest.mark.skipif(not ops.is_available(), reason="the C++ extension is not built"),
    pytest.mark.parametrize("device", DEVICES),
]


@pytest.mark.parametrize("sparse", [False, True])
def test_generated_cases(device: str, sparse: bool) -> None:
    for number in range(5000, 5012):
        case = make_case(number, dtype="float32", small=True)
        if case.plan.is_dense:
            continue
        judge = Judge(case)
        lookup = partial(engine, sparse=sparse, device=device)
        judge.check(run(case, judge.gradient, lookup, device=device))


def test_features(device: str) -> None:
    for number in range(5000, 5004):
        cases = make_feature_cases(number)
        judges = [Judge(case) for case in cases]
        results = run_features(cases, [judge.gradient for judge in judges], device)
        for judge, result in zip(judges, results, strict=True):
            if not judge.case.plan.is_dense:
                judge.check(result)
