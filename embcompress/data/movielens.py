"""MovieLens as click logs: 100K, 1M, and the CSV format of 20M and newer.

Clicked means rated 4 or better. Ids: 0 is unknown or missing, then the values of each feature in
rising order. Source of the formats: the README files that GroupLens ships with the data.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcompress.data.click_log import ClickLog, ClickLogWriter, Feature
from embcompress.data.delimited import Block, MalformedRows, blocks, read_columns, right_rows
from embcompress.data.progress import RowProgress

CLICKED_AT = 4.0
_NUMBER = {
    "user": r"^[0-9]{1,15}$",
    "item": r"^[0-9]{1,15}$",
    "rating": r"^[0-9](\.[0-9]+)?$",
    "time": r"^[0-9]{1,12}$",
}
_RATING = tuple(_NUMBER)
_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
    "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance",
    "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_AGE_BOUNDS = (18, 25, 35, 45, 50, 56)


@dataclass
class _Items:
    """Side information of items and users, by their raw number."""

    year: dict[int, int] = field(default_factory=dict)
    genres: dict[int, tuple[str, ...]] = field(default_factory=dict)


Users = Mapping[str, Mapping[int, Any]]


@dataclass(frozen=True)
class _Format:
    """Where a release of MovieLens keeps what."""

    ratings: str
    delimiter: bytes
    header: bool
    items: Callable[[Path], _Items]
    users: Callable[[Path], Users]


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="latin-1") as stream:
        yield from (line.rstrip("\n") for line in stream if line.strip())


def _year(text: str) -> int:
    found = re.search(r"(\d{4})\D*$", text)
    return int(found[1]) if found else 0


def _fields(path: Path, number: int, line: str, parts: list[str], expected: int) -> list[str]:
    if len(parts) < expected or not parts[0].isdigit():
        raise ValueError(f"{path.name}:{number}: expected {expected} fields, got {line!r}")
    return parts


def _items_100k(directory: Path) -> _Items:
    items, path = _Items(), directory / "u.item"
    for number, line in enumerate(_lines(path), 1):
        parts = _fields(path, number, line, line.split("|"), 5 + len(_GENRES_100K))
        item, flags = int(parts[0]), parts[5:]
        items.year[item] = _year(parts[2])
        items.genres[item] = tuple(
            genre for genre, flag in zip(_GENRES_100K, flags, strict=True) if flag == "1"
        )
    return items


def _users_100k(directory: Path) -> Users:
    users: dict[str, dict[int, Any]] = {"age": {}, "gender": {}, "occupation": {}, "zip": {}}
    path = directory / "u.user"
    for number, line in enumerate(_lines(path), 1):
        user, age, gender, occupation, code = _fields(path, number, line, line.split("|"), 5)
        users["age"][int(user)] = int(np.searchsorted(_AGE_BOUNDS, int(age), side="right"))
        users["gender"][int(user)] = gender
        users["occupation"][int(user)] = occupation
        users["zip"][int(user)] = code
    return users


def _items_1m(directory: Path) -> _Items:
    items, path = _Items(), directory / "movies.dat"
    for number, line in enumerate(_lines(path), 1):
        item, title, genres = _fields(path, number, line, line.split("::"), 3)
        items.year[int(item)] = _year(title)
        items.genres[int(item)] = tuple(genres.split("|"))
    return items


def _users_1m(directory: Path) -> Users:
    users: dict[str, dict[int, Any]] = {"age": {}, "gender": {}, "occupation": {}, "zip": {}}
    path = directory / "users.dat"
    for number, line in enumerate(_lines(path), 1):
        user, gender, age, occupation, code = _fields(path, number, line, line.split("::"), 5)
        for name, value in zip(users, (age, gender, occupation, code), strict=True):
            users[name][int(user)] = value
    return users


def _items_csv(directory: Path) -> _Items:
    items, path = _Items(), directory / "movies.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), 2):
            if None in row.values() or not row["movieId"].isdigit():
                raise ValueError(f"{path.name}:{number}: expected movieId,title,genres, got {row}")
            items.year[int(row["movieId"])] = _year(row["title"])
            items.genres[int(row["movieId"])] = tuple(row["genres"].split("|"))
    return items


def _no_users(directory: Path) -> Users:
    return {}


FORMATS = {
    "ml-100k": _Format("u.data", b"\t", False, _items_100k, _users_100k),
    "ml-1m": _Format("ratings.dat", b"::", False, _items_1m, _users_1m),
    "ml-20m": _Format("ratings.csv", b",", True, _items_csv, _no_users),
}


# -------------------------------------------------------------------------------- preparation


def _read_ratings(
    path: Path, layout: _Format, malformed: MalformedRows, progress: bool
) -> dict[str, NDArray[Any]]:
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in _RATING}
    with RowProgress("reading ratings", path.stat().st_size, visible=progress) as bar:
        header = len(_header(path)) if layout.header else 0
        for block in blocks(path, start=header, first_line=2 if layout.header else 1):
            rows = _rating_rows(block, layout, malformed)
            for name, values in rows.items():
                parts[name].append(values)
            bar.advance(len(block.data), len(rows["user"]))
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    malformed.check(len(columns["user"]) + malformed.count, final=True)
    return columns


def _header(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.readline()


def _rating_rows(
    block: Block, layout: _Format, malformed: MalformedRows
) -> dict[str, NDArray[Any]]:
    import pyarrow.compute as pc

    delimiter, data = layout.delimiter, block.data
    if len(delimiter) > 1:
        delimiter, data = b"\t", data.replace(delimiter, b"\t")
    single = Block(block.path, data, block.first_line, block.end)
    columns, lines = read_columns(single, delimiter, _RATING, malformed)
    bad = {
        name: ~np.asarray(pc.match_substring_regex(columns[name], _NUMBER[name]))
        for name in _RATING
    }
    keep = np.flatnonzero(right_rows(block.path, lines, columns, bad, malformed))
    return {
        name: pc.cast(columns[name].take(keep), "double").to_numpy(zero_copy_only=False)
        for name in _RATING
    }


def _numbered(values: list[Any]) -> tuple[NDArray[np.int64], int]:
    """Ids 1, 2, … of the distinct values in rising order (0 is missing), and their number."""
    distinct = sorted({value for value in values if value is not None})
    number = {value: position + 1 for position, value in enumerate(distinct)}
    return np.array([number.get(value, 0) for value in values], np.int64), len(distinct) + 1


def _joined(raw: NDArray[np.int64], table: Mapping[int, Any]) -> tuple[NDArray[np.int64], int]:
    """Ids of a property of users or items, for every row."""
    present, inverse = np.unique(raw, return_inverse=True)
    ids, size = _numbered([table.get(int(value)) for value in present])
    return ids[inverse], size


def _genre_bags(
    raw: NDArray[np.int64], items: _Items
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Concatenated genre ids of every row, how many each has, and the number of genres."""
    names = sorted({genre for genres in items.genres.values() for genre in genres})
    number = {name: position for position, name in enumerate(names)}
    present, inverse = np.unique(raw, return_inverse=True)
    bags = [[number[g] for g in items.genres.get(int(item), ())] for item in present]
    lengths = np.array([len(bag) for bag in bags], np.int64)
    starts = np.cumsum(lengths) - lengths
    flat = np.array([genre for bag in bags for genre in bag], np.int64)
    counts = lengths[inverse]
    ends = np.cumsum(counts)
    positions = np.arange(int(counts.sum())) + np.repeat(starts[inverse] - (ends - counts), counts)
    return flat[positions], counts, len(names)


def prepare_movielens(
    release: str,
    directory: Path,
    target: Path,
    *,
    max_malformed: float = 0.001,
    progress: bool = True,
) -> ClickLog:
    """Prepare a MovieLens folder; rows in time order.

    Features: user, item, age, gender, occupation and zip (where the release has them), release
    year, hour and weekday (UTC), and genres as a bag.

    Args:
        release: ``"ml-100k"``, ``"ml-1m"`` or ``"ml-20m"`` (also newer CSV releases).
        directory: the unpacked folder.
        target: directory of the prepared log.
    """
    layout, malformed = FORMATS[release], MalformedRows(max_malformed)
    columns = _read_ratings(directory / layout.ratings, layout, malformed, progress)
    order = np.argsort(columns["time"], kind="stable")
    user, item, seconds = (
        columns[name][order].astype(np.int64) for name in ("user", "item", "time")
    )
    items = layout.items(directory)
    single = {"user": _numbered_column(user), "item": _numbered_column(item)}
    for name, table in layout.users(directory).items():
        single[name] = _joined(user, table)
    single["year"] = _joined(item, items.year)
    single["hour"] = (seconds // 3600) % 24, 24
    single["weekday"] = (seconds // 86400 + 3) % 7, 7  # the epoch began on a Thursday
    genres, counts, num_genres = _genre_bags(item, items)
    features = (
        *(Feature(name, size) for name, (_, size) in single.items()),
        Feature("genres", num_genres, is_bag=True),
    )
    bag = len(features) - 1
    writer = ClickLogWriter(
        target, name=release, features=features, dense_names=(), rows=len(user),
        bag_ids={bag: len(genres)}, has_time=True,
    )  # fmt: skip
    writer.write(
        0,
        label=(columns["rating"][order] >= CLICKED_AT).astype(np.uint8),
        time=seconds,
        ids=np.stack([ids for ids, _ in single.values()], axis=1),
    )
    writer.write_bag(bag, 0, 0, genres, counts)
    return writer.finish(malformed=malformed.count, malformed_examples=malformed.examples)


def _numbered_column(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    distinct, inverse = np.unique(values, return_inverse=True)
    return inverse.astype(np.int64) + 1, len(distinct) + 1
