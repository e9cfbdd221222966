"""HotSketch: the compiled update, the one in torch, and a plain loop are one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embcompress.hashing import hash_bucket
from embcompress.procedures import hot_sketch
from embcompress.procedures.hot_sketch import EMPTY, add, add_reference, promote

KEY = 0x9E3779B97F4A7C15


def new_sketch(buckets: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((buckets, width), EMPTY), torch.zeros(buckets, width)


def some_batch(seed: int, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids, a few of them again and again; whole amounts, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(count, generator=generator) ** 5 * 2**40).long().unique()
    return ids, torch.randint(0, 4, (ids.numel(),), generator=generator).float() / 3


def plain_add(ids: list[int], amounts: list[float], slots: list, scores: list, kept: int) -> None:
    for id, amount in zip(ids, amounts, strict=True):
        if amount == 0:
            continue
        bucket = hash_bucket(id, KEY, len(slots))
        row, values = slots[bucket], scores[bucket]
        if id not in row:
            free = [s for s in range(kept, len(row)) if row[s] == EMPTY]
            weakest = min(range(kept, len(row)), key=lambda s: values[s])
            row[free[0] if free else weakest] = id
        values[row.index(id)] = float(np.float32(values[row.index(id)]) + np.float32(amount))


@pytest.mark.parametrize("implementation", [add, add_reference])
@pytest.mark.parametrize(
    ("buckets", "width", "kept"), [(1, 2, 1), (5, 4, 2), (64, 8, 4), (3, 3, 0)]
)
def test_updates(implementation: object, buckets: int, width: int, kept: int) -> None:
    slots, scores = new_sketch(buckets, width)
    plain_slots, plain_scores = slots.tolist(), scores.tolist()
    for seed in range(20):
        ids, amounts = some_batch(seed)
        implementation(ids, amounts, slots, scores, KEY, kept)
        plain_add(ids.tolist(), amounts.tolist(), plain_slots, plain_scores, kept)
        if seed % 5 == 4:
            promote(slots, scores, kept, 1.0)
            plain_slots, plain_scores = slots.tolist(), scores.tolist()
        assert slots.tolist() == plain_slots
        assert scores.tolist() == plain_scores
    assert (slots[:, kept:] != EMPTY).any()


def test_a_score_is_never_below_the_true_sum() -> None:
    slots, scores = new_sketch(16, 4)
    true: dict[int, float] = {}
    for seed in range(30):
        ids, amounts = some_batch(seed)
        ids = torch.cat([ids, torch.tensor([7**12])])
        amounts = torch.cat([amounts, torch.tensor([5.0])])
        add(ids, amounts, slots, scores, KEY, 1)
        for id, amount in zip(ids.tolist(), amounts.tolist(), strict=True):
            true[id] = true.get(id, 0) + amount
    held = [(int(i), float(s)) for i, s in zip(slots.flatten(), scores.flatten(), strict=True)]
    assert all(score >= true[id] - 1e-4 for id, score in held if id != EMPTY)
    # More than a third of all that its bucket sees: it cannot have been driven out.
    assert 7**12 in slots.flatten().tolist()


def test_no_ids_change_nothing() -> None:
    slots, scores = new_sketch(4, 3)
    for implementation in (add, add_reference):
        none = torch.empty(0, dtype=torch.int64)
        implementation(none, torch.empty(0), slots, scores, KEY, 1)
        implementation(torch.tensor([5]), torch.zeros(1), slots, scores, KEY, 1)
    assert (slots == EMPTY).all() and not scores.any()


def test_the_strong_change_places_with_the_weak() -> None:
    slots = torch.tensor([[1, 2, 3, 4], [5, EMPTY, 6, EMPTY], [7, 8, 9, 10], [EMPTY] * 4])
    scores = torch.tensor(
        [[1.0, 5.0, 7.0, 6.0], [1.0, 0.0, 1.0, 0.0], [1.0, 2.0, 1.05, 0.5], [0.0] * 4]
    )
    changed = promote(slots, scores, 2, 1.1)
    assert slots.tolist()[:2] == [[3, 4, 1, 2], [5, 6, EMPTY, EMPTY]]
    assert scores.tolist()[0] == [7.0, 6.0, 1.0, 5.0]
    assert slots[2].tolist() == [7, 8, 9, 10]  # not stronger by the margin
    assert changed.tolist() == [0, 1, 3]
    assert promote(slots, scores, 2, 1.1).numel() == 0


@pytest.mark.skipif(not hot_sketch._is_compiled("cpu"), reason="the sketch is not compiled")
@pytest.mark.parametrize("wrong", ["ids", "amounts", "scores", "kept", "count"])
def test_wrong_arguments_are_refused(wrong: str) -> None:
    slots, scores = new_sketch(4, 3)
    arguments = {"ids": torch.tensor([1, 2]), "amounts": torch.ones(2), "scores": scores, "kept": 1}
    arguments[wrong if wrong != "count" else "amounts"] = {
        "ids": torch.tensor([1, 2], dtype=torch.int32),
        "amounts": torch.ones(2).double(),
        "scores": torch.zeros(4, 2),
        "kept": 3,
        "count": torch.ones(3),
    }[wrong]
    with pytest.raises(RuntimeError, match=r"contiguous|hot_sketch_add"):
        torch.ops.embcompress.hot_sketch_add(
            arguments["ids"], arguments["amounts"], slots, arguments["scores"], 5, arguments["kept"]
        )
