"""From a spec such as ``"ml-100k=DIR"`` to a prepared click log, prepared once."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from embcompress.data.avazu import AvazuSettings, prepare_avazu
from embcompress.data.click_log import FORMAT, ClickLog
from embcompress.data.criteo import CriteoSettings, prepare_criteo
from embcompress.data.movielens import FORMATS, prepare_movielens
from embcompress.data.schema import ClickLogSchema, prepare_schema
from embcompress.data.synthetic import SyntheticSettings, prepare_synthetic

ACCEPTED = """accepted data:
  ml-100k=DIR, ml-1m=DIR, ml-20m=DIR     MovieLens (20m: also newer CSV releases)
  criteo=FILE[,FILE...][,min_count=N,hash_ids_to=N]  Criteo text, .gz, or a directory of days
  avazu=FILE[,FILE...][,options as of criteo]   Avazu's train.csv, .gz, or a directory of such
  schema=FILE[,source=PATH]              a parquet or CSV log that a schema describes
  synthetic[:rows=N,ids=N,seed=N,...]    a synthetic click log
kind:PATH is the same as kind=PATH"""


def default_cache() -> Path:
    """``$EMBCOMPRESS_CACHE``, or ``~/.cache/embcompress``."""
    return Path(os.environ.get("EMBCOMPRESS_CACHE", Path.home() / ".cache" / "embcompress"))


def load_click_log(
    spec: str, *, cache: Path | str | None = None, progress: bool = True
) -> ClickLog:
    """Prepare a click log once and open it.

    Args:
        spec: see :data:`ACCEPTED`.
        cache: directory of prepared logs (default: :func:`default_cache`). The key is made of
            the sources' paths, sizes and times of change, and of the settings.
        progress: whether to show it on standard error.

    Raises:
        ValueError: the spec is not understood; lists what is.
        FileNotFoundError: a source is missing.
    """
    kind, sources, settings, prepare = _parse(spec)
    identity = json.dumps(
        [
            FORMAT,
            kind,
            [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in sources],
            settings,
        ],
        sort_keys=True,
    )
    key = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    target = (
        Path(cache) if cache is not None else default_cache()
    ) / f"{quote(kind, safe='')}-{key}"
    if (target / "meta.json").is_file():
        return ClickLog.open(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        if (target / "meta.json").is_file():  # another process was first
            return ClickLog.open(target)
        return prepare(target, progress)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time prepares a log; the others wait.

    The lock is the operating system's and ends with the process, however that ends.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows has no such locks
        yield
        return
    with target.with_name(target.name + ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


_MOVIELENS_SUFFIXES = (".data", ".user", ".item", ".dat", ".csv")

Prepare = Callable[[Path, bool], ClickLog]


def _parse(spec: str) -> tuple[str, Sequence[Path], dict[str, Any], Prepare]:
    """Kind, source files, settings and the preparation of a spec."""
    if spec == "synthetic" or spec.startswith("synthetic:"):
        return _synthetic(spec.partition(":")[2])
    written = re.fullmatch(r"([^=:]*)[=:](.+)", spec)
    if written is None:
        raise ValueError(f"data {spec!r} is not understood; {ACCEPTED}")
    kind, rest = written.groups()
    if kind in FORMATS:
        return _movielens(kind, Path(rest))
    if kind == "criteo":
        return _criteo(rest)
    if kind == "avazu":
        return _avazu(rest)
    if kind == "schema":
        return _schema(rest)
    raise ValueError(f"data {spec!r} is of unknown kind {kind!r}; {ACCEPTED}")


def _options(text: str, cls: type) -> dict[str, Any]:
    """``"a=1,b=2"`` as arguments of a settings dataclass."""
    known = {field.name: str(field.type) for field in fields(cls)}
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, separator, value = item.partition("=")
        if name not in known or not separator:
            raise ValueError(f"option {item!r} is not understood; options: {', '.join(known)}")
        try:
            values[name] = float(value) if known[name] == "float" else int(value)
        except ValueError:
            raise ValueError(f"option {name} must be a number, got {value!r}") from None
    return values


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return path


def _synthetic(options: str) -> tuple[str, Sequence[Path], dict[str, Any], Prepare]:
    settings = SyntheticSettings(**_options(options, SyntheticSettings))

    def prepare(target: Path, progress: bool) -> ClickLog:
        return prepare_synthetic(settings, target, progress=progress)

    return "synthetic", (), asdict(settings), prepare


def _movielens(kind: str, directory: Path) -> tuple[str, Sequence[Path], dict[str, Any], Prepare]:
    _existing(directory / FORMATS[kind].ratings)
    files = sorted(path for path in directory.iterdir() if path.suffix in _MOVIELENS_SUFFIXES)

    def prepare(target: Path, progress: bool) -> ClickLog:
        return prepare_movielens(kind, directory, target, progress=progress)

    return kind, files, {}, prepare


def _text_sources(rest: str) -> tuple[list[Path], str]:
    """Files and options of ``"PATH,PATH,option=value"``."""
    parts = rest.split(",")
    names = [part for part in parts if not re.match(r"[a-z_]+=", part)]
    options = ",".join(part for part in parts if part not in names)
    return [file for name in names for file in _day_files(Path(name))], options


def _criteo(rest: str) -> tuple[str, Sequence[Path], dict[str, Any], Prepare]:
    files, options = _text_sources(rest)
    settings = CriteoSettings(**_options(options, CriteoSettings))

    def prepare(target: Path, progress: bool) -> ClickLog:
        return prepare_criteo(files, target, settings, progress=progress)

    return "criteo", files, asdict(settings), prepare


def _avazu(rest: str) -> tuple[str, Sequence[Path], dict[str, Any], Prepare]:
    files, options = _text_sources(rest)
    settings = AvazuSettings(**_options(options, AvazuSettings))

    def prepare(target: Path, progress: bool) -> ClickLog:
        return prepare_avazu(files, target, settings, progress=progress)

    return "avazu", files, asdict(settings), prepare


def _day_files(path: Path) -> list[Path]:
    """The file, or those of a directory, ``day_2`` before ``day_10``."""
    if not _existing(path).is_dir():
        return [path]

    def by_number(file: Path) -> list[tuple[int, str]]:
        return [(int(part or -1), "") if part.isdigit() else (-1, part)
                for part in re.split(r"(\d+)", file.name)]  # fmt: skip

    files = [file for file in path.iterdir() if file.is_file() and file.name[0] != "."]
    if not files:
        raise FileNotFoundError(f"{path} holds no files")
    return sorted(files, key=by_number)


def _schema(rest: str) -> tuple[str, Sequence[Path], dict[str, Any], Prepare]:
    name, _, options = rest.partition(",")
    path = _existing(Path(name))
    schema = ClickLogSchema.load(path)
    sources = [path.parent / source for source in schema.sources]
    if options:
        key, _, value = options.partition("=")
        if key != "source" or not value:
            raise ValueError(f"option {options!r} is not understood; options: source")
        sources = [Path(value)]
    sources = [_existing(source) for source in sources]

    def prepare(target: Path, progress: bool) -> ClickLog:
        return prepare_schema(schema, sources, target, progress=progress)

    return f"schema-{schema.name}", sources, asdict(schema), prepare
