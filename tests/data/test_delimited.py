"""Blocks of lines and the fields of them, whatever the bytes are."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embcompress.data.delimited import Block, MalformedRows, blocks, read_columns, right_rows

LINES = st.lists(st.binary(max_size=12).map(lambda text: text.replace(b"\n", b"")), max_size=30)


@settings(deadline=None, max_examples=60)
@given(lines=LINES, size=st.integers(13, 64), ended=st.booleans(), packed=st.booleans())
def test_blocks_are_the_same_wherever_one_begins_again(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    size: int,
    ended: bool,
    packed: bool,
) -> None:
    text = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    path = tmp_path_factory.mktemp("blocks") / ("day.gz" if packed else "day")
    path.write_bytes(gzip.compress(text) if packed else text)
    found = list(blocks(path, size=size))
    whole = b"".join(block.data for block in found)
    assert whole == (text if text.endswith(b"\n") or not text else text + b"\n")
    line = 1
    for number, block in enumerate(found):
        assert block.first_line == line and block.data.endswith(b"\n")
        line += block.data.count(b"\n")
        again = list(blocks(path, start=block.end, first_line=line, size=size))
        assert again == found[number + 1 :]


def test_a_file_that_is_no_text_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "day").write_bytes(b"1\n" + bytes(1000))
    with pytest.raises(ValueError, match=r"day:2 is longer than 100 bytes; is it text\?"):
        list(blocks(tmp_path / "day", size=100))


@settings(deadline=None, max_examples=200)
@given(lines=st.lists(st.binary(max_size=20).map(lambda t: t.replace(b"\n", b"")), min_size=1))
def test_fields_equal_a_split_of_each_line(lines: list[bytes]) -> None:
    lines = [line.replace(b"\x03", b"\t") for line in lines]  # more tabs
    malformed = MalformedRows(1.0)
    block = Block(Path("f"), b"\n".join(lines) + b"\n", 7, 0)
    columns, numbers = read_columns(block, b"\t", ("a", "b"), malformed)
    expected = {}
    for number, line in enumerate(lines, 7):
        fields = line.removesuffix(b"\r").split(b"\t")
        if len(fields) == 2 and not any(b"\r" in field for field in fields):
            expected[number] = tuple(fields)
    pairs = zip(*([x.as_buffer().to_pybytes() for x in columns[n]] for n in "ab"), strict=True)
    assert dict(zip(numbers.tolist(), pairs, strict=True)) == expected
    assert malformed.count == len(lines) - len(expected)


def test_bad_values_are_shown_even_if_they_are_no_text() -> None:
    malformed = MalformedRows(0.5)
    columns, lines = read_columns(Block(Path("f"), b"1\n\xff\n3\n", 1, 0), b"\t", ("a",), malformed)
    right = right_rows(Path("f"), lines, columns, {"a": np.array([False, True, False])}, malformed)
    assert right.tolist() == [True, False, True]
    assert malformed.examples == [r"f:2: a = b'\xff'"]
    malformed.check(3, final=True)
    malformed.add(Path("f"), 3, "x" * 10)
    with pytest.raises(ValueError, match=re.escape("2 of 3 rows are malformed")):
        malformed.check(3, final=True)
