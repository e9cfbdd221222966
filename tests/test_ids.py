"""Counting ids over a corpus, and files of ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import embcompress as ec


def test_counts_over_any_batches() -> None:
    ids = torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(0))
    expected = torch.bincount(ids, minlength=60)

    def batches() -> Iterator[object]:
        yield ids[:100].int().reshape(10, 10)
        yield ids[100:200].numpy()
        yield ids[200:300].tolist()
        yield np.zeros((0, 3))
        yield torch.empty(0)

    assert torch.equal(ec.count_ids(batches(), 60), expected)
    assert torch.equal(ec.count_ids(ids, 60), expected)
    assert torch.equal(ec.count_ids(ids.numpy().astype(np.uint8), 60), expected)
    assert torch.equal(ec.count_ids([], 60), torch.zeros(60, dtype=torch.int64))


@pytest.mark.parametrize("bad", [-1, 10])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    with pytest.raises(IndexError, match=rf"batch 1 has id {bad}, which is outside \[0, 10\)"):
        ec.count_ids([torch.arange(10), torch.tensor([3, bad])], 10)
    with pytest.raises(TypeError, match=r"batch 0 must hold integer ids, got torch\.float32"):
        ec.count_ids([torch.rand(3)], 10)


def test_a_file_of_ids_comes_back(tmp_path: Path) -> None:
    ids = torch.tensor([7, 0, 99, 2**40])
    path = tmp_path / "ids.txt"
    ec.write_ids(path, ids)
    assert path.read_text() == f"7\n0\n99\n{2**40}\n"
    assert torch.equal(ec.read_ids(path, 2**40 + 1), ids)
    path.write_bytes(b"7\r\n0\r\n99\r\n1099511627776")  # other ends of lines, none at the end
    assert torch.equal(ec.read_ids(path, 2**40 + 1), ids)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\nx3\n", r":3: 'x3' is not an id in \[0, 10\)"),
        ("1\n\n2\n", r":2: '' is not an id"),
        ("1\n-2\n", r":2: '-2' is not an id"),
        ("1\n 2\n", r":2: ' 2' is not an id"),
        ("1_0\n", r":1: '1_0' is not an id"),
        ("1.0\n", r":1: '1\.0' is not an id"),
        ("10\n", r":1: '10' is not an id in \[0, 10\)"),
        ("9" * 5000 + "\n", r":1: '9+' is not an id"),
        ("٣\n", r":1: '٣' is not an id"),
        ("1\n2\n3\n2\n", r":4: id 2 was already in line 2"),
        ("1\n01\n", r":2: id 1 was already in line 1"),
        ("", "has no ids; write one a line"),
    ],
)
def test_malformed_lines_are_errors_with_their_number(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ec.read_ids(path, 10)


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    path.write_bytes(b"1\n\xff\xfe\n")
    with pytest.raises(ValueError, match=":2: "):
        ec.read_ids(path, 10)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("5\n")
    with pytest.raises(AttributeError):
        ec.write_ids(path, [1, 2])  # type: ignore[arg-type]
    assert path.read_text() == "5\n" and list(tmp_path.iterdir()) == [path]
