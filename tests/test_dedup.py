"""Deduplication: near-equal blocks are one, and codes say which."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.approximation.deduplication import deduplicate
from embcompress.layouts.packing import unpack_codes
from tests.phased_method import Model, new_optimizer, train

ROWS, WIDTH = 120, 8


@pytest.fixture
def table() -> torch.Tensor:
    """Ten different rows, each of twelve ids, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, WIDTH, generator=generator)
    noise = 0.01 * torch.randn(ROWS, WIDTH, generator=generator)
    return centers[torch.arange(ROWS) % 10] + noise


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_the_lookup_is_the_blocks_side_by_side(pieces: int) -> None:
    method = ec.Dedup(pieces=pieces)
    module = ec.Embedding(ROWS, WIDTH, method=method, budget="40%")
    blocks, codes = module.plan.stores
    which = unpack_codes(module.codes, 0, ROWS * pieces, codes.bits).view(ROWS, pieces)
    expected = torch.cat([module.blocks[which[:, t]] for t in range(pieces)], dim=1)
    assert torch.equal(module(torch.arange(ROWS)), expected)
    assert int(which.min()) >= 0 and int(which.max()) < blocks.rows
    assert codes.bits == blocks.rows.bit_length()


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("noise", [False, True])
def test_equal_blocks_are_stored_once(pieces: int, noise: bool, table: torch.Tensor) -> None:
    """Equal ones for certain; near-equal ones where there is some room for what k-means misses."""
    size = (40 if noise else 10) * pieces
    table = table if noise else table[torch.arange(ROWS) % 10]
    budget = size * WIDTH // pieces * 4 + -(-ROWS * pieces * size.bit_length() // 8)
    module = ec.Embedding.from_pretrained(table, method=ec.Dedup(pieces=pieces), budget=budget)
    assert module.plan.bytes == budget
    assert (module.to_dense() - table).abs().max() <= (0.06 if noise else 0)


def test_many_blocks_are_divided_and_near_ones_stay_together() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(300, WIDTH, generator=generator)
    blocks = centers[torch.randint(0, 300, (9000,), generator=generator)]
    blocks = blocks + 1e-4 * torch.randn(9000, WIDTH, generator=generator)
    kept, which = deduplicate(blocks, 900, seed=3)
    assert kept.shape == (900, WIDTH) and int(which.min()) >= 0 and int(which.max()) < 900
    error = (kept[which] - blocks).square().sum(1)
    assert float((error < 1e-5).float().mean()) > 0.95
    again, same = deduplicate(blocks, 900, seed=3)
    assert torch.equal(again, kept) and torch.equal(same, which)


def test_counts_say_which_blocks_matter() -> None:
    blocks = torch.tensor([[0.0], [1.0], [10.0]])
    kept, which = deduplicate(blocks, 2, torch.tensor([100, 1, 0]))
    assert which.tolist() == [0, 0, 1] or which.tolist() == [1, 1, 0]
    assert float(kept[which[0]]) < 0.1


def test_the_second_phase_begins_with_what_the_first_has_learned() -> None:
    model = Model(ec.Dedup(epochs=3), budget="60%")
    procedure = ec.TrainingProcedure(model)
    assert [(phase.name, phase.epochs) for phase in procedure.phases] == [
        ("train", 3),
        ("fine_tune", None),
    ]
    procedure.begin_phase()
    assert all(model.table(k).plan.is_dense for k in range(2))
    optimizer = new_optimizer(model, fused=True)
    procedure.attach(optimizer)
    train(model, optimizer, procedure, range(5))
    learned = [model.table(k).to_dense() for k in range(2)]
    procedure.begin_phase()
    for k in range(2):
        error = (model.table(k).to_dense() - learned[k]).square().sum()
        assert not model.table(k).plan.is_dense
        assert 0 < float(error) < 0.5 * float(learned[k].square().sum())


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="pieces must be at least 1, got 0"):
        ec.Dedup(pieces=0)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        ec.Dedup(epochs=0)
    with pytest.raises(ValueError, match="pieces = 3 does not divide the table's width, 8"):
        ec.Embedding(ROWS, WIDTH, method=ec.Dedup(pieces=3))
