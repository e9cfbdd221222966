"""The prepared format: batches, splits, damage; MovieLens, schemas and the synthetic log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from embcompress.data import (
    ClickLog,
    ClickLogError,
    ClickLogSchema,
    ClickLogWriter,
    MalformedRowsError,
    NegativeSampling,
    SyntheticSettings,
    load_click_log,
    prepare_movielens,
    prepare_schema,
    prepare_synthetic,
)

SMALL = SyntheticSettings(rows=3000, ids=500, features=3)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ClickLog:
    return prepare_synthetic(SMALL, tmp_path_factory.mktemp("log") / "log", progress=False)


def test_batches_are_feature_major(log: ClickLog) -> None:
    rows = np.array([5, 2999, 5, 0])
    batch = log.batch(rows)
    assert batch.label.shape == (4,) and batch.dense.shape == (4, 4)
    assert batch.offsets.shape == (4 * 4 + 1,) and int(batch.offsets[-1]) == len(batch.ids)
    for number, feature in enumerate(log.features):
        for position, row in enumerate(rows):
            bag = number * 4 + position
            ids = batch.ids[batch.offsets[bag] : batch.offsets[bag + 1]]
            alone = log.batch(slice(row, row + 1))
            assert (
                ids.tolist()
                == alone.ids[alone.offsets[number] : alone.offsets[number + 1]].tolist()
            )
            assert all(0 <= x < feature.num_embeddings for x in ids.tolist())
    empty = log.batch(slice(0, 0))
    assert empty.ids.shape == (0,) and empty.offsets.tolist() == [0]


def test_slices_equal_row_numbers(log: ClickLog) -> None:
    one, two = log.batch(slice(10, 90)), log.batch(np.arange(10, 90))
    assert one.ids.equal(two.ids) and one.offsets.equal(two.offsets) and one.dense.equal(two.dense)


def test_splits(log: ClickLog) -> None:
    for kind in ("time", "random"):
        split = log.split(kind, seed=1, validation=0.1, test=0.2)
        everything = np.concatenate([split.train, split.validation, split.test])
        assert sorted(everything) == list(range(3000))
        assert len(split.test) == 600 and len(split.validation) == 300
    time_split = log.split("time")
    assert time_split.train.max() < time_split.validation.min() < time_split.test.min()
    first, second = log.split("random", seed=1), log.split("random", seed=1)
    assert (first.train == second.train).all()
    assert (first.train != log.split("random", seed=2).train).any()
    with pytest.raises(ValueError, match="kind of split"):
        log.split("user")
    with pytest.raises(ValueError, match="nothing to train"):
        log.split("time", validation=0.5, test=0.5)


def log_of_days(directory: Path, rows_of_days: list[int]) -> ClickLog:
    """Rows of several days, the last of them first; day 3 has none."""
    rows = sum(rows_of_days)
    writer = ClickLogWriter(
        directory, name="days", features=(), dense_names=(), rows=rows, has_time=True
    )
    days = np.repeat([d if d < 3 else d + 1 for d in range(len(rows_of_days))], rows_of_days)
    times = days.astype(np.int64) * 86_400 + np.arange(rows) % 86_400
    writer.write(0, label=np.zeros(rows, np.uint8), time=times[::-1])
    return writer.finish()


@pytest.mark.parametrize(
    ("rows_of_days", "validation", "test", "parts"),
    [
        ([10, 10, 10, 10], 0.25, 0.25, [20, 10, 10]),
        ([10, 10, 10, 10], 0.01, 0.01, [20, 10, 10]),  # a day at least
        ([10, 10, 10, 10], 0.4, 0.5, [10, 10, 20]),
        ([30, 12, 8, 5, 7], 0.1, 0.19, [42, 8, 12]),
        ([1, 1, 1], 0.1, 0.1, [1, 1, 1]),
    ],
)
def test_a_split_by_day_has_whole_days(
    rows_of_days: list[int], validation: float, test: float, parts: list[int], tmp_path: Path
) -> None:
    log = log_of_days(tmp_path / "log", rows_of_days)
    split = log.split("day", validation=validation, test=test)
    found = [split.train, split.validation, split.test]
    assert [len(part) for part in found] == parts
    days = [set((log.times[part] // 86_400).tolist()) for part in found]
    assert max(days[0]) < min(days[1]) and max(days[1]) < min(days[2])
    assert sorted(np.concatenate(found)) == list(range(len(log)))


def test_rows_that_cannot_be_split_by_day(log: ClickLog, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no times: split it by 'time'"):
        log.split("day")
    with pytest.raises(ValueError, match="at least 3 days, these are of 2"):
        log_of_days(tmp_path / "two", [5, 5]).split("day")


@pytest.mark.parametrize("damage", ["truncate", "remove", "other shape", "meta", "version"])
def test_damage_is_found_when_a_log_is_opened(damage: str, tmp_path: Path) -> None:
    directory = prepare_synthetic(SMALL, tmp_path / "log", progress=False).directory
    path = directory / "dense.npy"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "remove":
        path.unlink()
    elif damage == "other shape":
        np.save(path, np.zeros((3, 4), np.float32))
    elif damage == "meta":
        (directory / "meta.json").write_text((directory / "meta.json").read_text()[:100])
    else:
        meta = json.loads((directory / "meta.json").read_text())
        (directory / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(ClickLogError, match="prepare"):
        ClickLog.open(directory)


def test_specs_that_are_not_understood() -> None:
    for spec in ("nonsense", "nonsense=x", "synthetic:rows", "synthetic:colour=3", "ml-100k="):
        with pytest.raises(ValueError, match=r"understood|unknown kind|accepted"):
            load_click_log(spec)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_click_log("criteo=/no/such/file")
    with pytest.raises(ValueError, match="must be a number"):
        load_click_log("synthetic:rows=many")


def test_the_synthetic_log_is_the_same_again_and_has_a_ceiling(tmp_path: Path) -> None:
    first = prepare_synthetic(SMALL, tmp_path / "a", progress=False)
    second = prepare_synthetic(SMALL, tmp_path / "b", progress=False)
    assert all(
        (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
        for path in (tmp_path / "a").iterdir()
    )
    assert first.meta == second.meta
    assert 0.6 < first.meta["teacher_auc"] < 0.95
    assert first.labels.std() > 0.3
    counts = np.sort(np.bincount(first._ids[:, 0]))[::-1]
    assert counts[0] > 5 * max(1, counts[len(counts) // 2])  # power law


def test_drift_moves_the_popular_ids(tmp_path: Path) -> None:
    settings = SyntheticSettings(rows=20_000, ids=2000, features=2, drift=0.5)
    log = prepare_synthetic(settings, tmp_path / "log", progress=False)
    largest = max(range(2), key=lambda f: log.features[f].num_embeddings)
    early, late = log._ids[:4000, largest], log._ids[-4000:, largest]
    assert np.bincount(early).argmax() != np.bincount(late).argmax()


# ---------------------------------------------------------------------------------- MovieLens


def test_movielens_100k(real_data: Path, tmp_path: Path) -> None:
    log = load_click_log(f"ml-100k={real_data}/ml-100k", cache=tmp_path, progress=False)
    assert len(log) == 100_000 and log.meta["malformed"] == 0
    sizes = {feature.name: feature.num_embeddings for feature in log.features}
    assert (sizes["user"], sizes["item"], sizes["genres"]) == (944, 1683, 19)
    assert (np.diff(log.times) >= 0).all() and log.labels.mean() == pytest.approx(0.55375)


def movielens_files(directory: Path, release: str) -> None:
    ratings = [(1, 10, 5, 0), (1, 20, 3, 90_000), (2, 10, 4, 100), (2, 30, 1, 200)]
    if release == "ml-1m":
        lines = ["::".join(map(str, rating)) for rating in ratings]
        (directory / "ratings.dat").write_text("\n".join(lines) + "\n")
        (directory / "movies.dat").write_text(
            "10::Toy (1995)::Comedy|Drama\n20::Caf\xe9 (1996)::Drama\n30::X (2000)::War\n",
            encoding="latin-1",
        )
        (directory / "users.dat").write_text("1::F::25::4::12345\n2::M::35::5::99999\n")
    else:
        lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, r)) for r in ratings)]
        (directory / "ratings.csv").write_text("\n".join(lines) + "\n")
        (directory / "movies.csv").write_text(
            'movieId,title,genres\n10,"Toy, The (1995)",Comedy|Drama\n20,Café (1996),Drama\n'
            "30,X (2000),War\n"
        )


@pytest.mark.parametrize("release", ["ml-1m", "ml-20m"])
def test_other_movielens_formats(release: str, tmp_path: Path) -> None:
    movielens_files(tmp_path, release)
    log = prepare_movielens(release, tmp_path, tmp_path / "log", progress=False)
    assert log.labels.tolist() == [1, 1, 0, 0]  # in time order
    names = [feature.name for feature in log.features]
    assert ("gender" in names) == (release == "ml-1m")
    batch = log.batch(slice(0, 1))
    genres = batch.ids[batch.offsets[-2] :]
    assert genres.tolist() == [0, 1]
    assert batch.ids[names.index("item")] == 1 and batch.ids[names.index("year")] == 1


def test_malformed_ratings_are_fatal_above_the_threshold(tmp_path: Path) -> None:
    movielens_files(tmp_path, "ml-20m")
    with (tmp_path / "ratings.csv").open("a") as stream:
        stream.write("1,2\n")
    with pytest.raises(MalformedRowsError, match=r"ratings\.csv:6: 2 fields instead of 4"):
        prepare_movielens("ml-20m", tmp_path, tmp_path / "log", progress=False)
    log = prepare_movielens("ml-20m", tmp_path, tmp_path / "log", max_malformed=0.5, progress=False)
    assert len(log) == 4 and log.meta["malformed"] == 1


# ------------------------------------------------------------------------------------ schemas

EVENTS = {
    "clicked": [1, 0, 1, None, 0, 1],
    "at": [10, 20, 30, 40, 50, 60],
    "price": [1.0, None, 3.0, 4.0, 5.0, -6.0],
    "user": ["ann", "bob", "ann", "eve", None, "ann"],
    "item": [7, 8, 7, 9, 7, 2**62],
    "tags": [["x", "y"], [], ["x"], ["z"], None, ["y", "x"]],
    "words": ["a b", "", "b", "c", "a", "b b"],
}


def write_events(directory: Path) -> ClickLogSchema:
    pq.write_table(pa.table(EVENTS), directory / "events.parquet")
    return ClickLogSchema(
        name="events",
        sources=("events.parquet",),
        label="clicked",
        time="at",
        numbers=("price",),
        ids=("user", "item"),
        bags={"tags": None, "words": " "},
        max_malformed=0.5,
    )


def test_a_log_that_a_schema_describes(tmp_path: Path) -> None:
    schema = write_events(tmp_path)
    log = prepare_schema(schema, [tmp_path / "events.parquet"], tmp_path / "log", progress=False)
    assert log.meta["malformed"] == 1 and "events.parquet:4" in log.meta["malformed_examples"][0]
    assert log.labels.tolist() == [1, 0, 1, 0, 1] and log.times.tolist() == [10, 20, 30, 50, 60]
    batch = log.batch(slice(0, 5))
    assert batch.dense[:, 0].tolist() == [1.0, 0.0, 3.0, 5.0, -6.0]
    user, item = batch.ids[:5].tolist(), batch.ids[5:10].tolist()
    assert user[0] == user[2] == user[4] == 2 and user[3] == 1  # most frequent; missing
    assert item[0] == item[2] == item[3] == 2
    lengths = np.diff(batch.offsets.numpy())[10:]
    assert lengths.tolist() == [2, 0, 1, 0, 2, 2, 0, 1, 1, 2]


def test_csv_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text("clicked,user,junk\n1,ann,0\n0,bob,0\nbroken\n1,ann,0\n")
    schema = ClickLogSchema(
        name="c", sources=("events.csv",), label="clicked", ids=("user",), max_malformed=0.5
    )
    log = prepare_schema(schema, [path], tmp_path / "log", progress=False)
    assert log.labels.tolist() == [1, 0, 1] and log.meta["malformed"] == 1
    assert log.batch(slice(0, 3)).ids.tolist() == [2, 3, 2]


def test_schemas_that_make_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text("name: x\nsources: [a.parquet]\nids: [u]\nlable: y\n")
    with pytest.raises(ValueError, match=r"unknown keys \['lable'\]; known keys: .*'label'"):
        ClickLogSchema.load(path)
    path.write_text("name: x\nsources: [a.parquet]\nids: [u]\n")
    with pytest.raises(ValueError, match="negatives must be given"):
        ClickLogSchema.load(path)
    (tmp_path / "schema.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        ClickLogSchema.load(tmp_path / "schema.json")
    schema = write_events(tmp_path)
    wrong = ClickLogSchema(name="x", sources=schema.sources, label="clicked", ids=("user", "shop"))
    with pytest.raises(ValueError, match=r"lacks the columns \['shop'\]; it has \['clicked'"):
        prepare_schema(wrong, [tmp_path / "events.parquet"], tmp_path / "log", progress=False)
    (tmp_path / "events.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="not a parquet file, or damaged"):
        prepare_schema(schema, [tmp_path / "events.parquet"], tmp_path / "log", progress=False)


@pytest.mark.parametrize("by_popularity", [False, True])
def test_negatives_come_from_the_same_slice(tmp_path: Path, by_popularity: bool) -> None:
    rng = np.random.default_rng(0)
    hours = np.sort(rng.integers(0, 5, 4000))
    # Articles live for one hour: hour h has the articles 100 * h … 100 * h + 9.
    table = {"t": hours * 3600 + 5, "article": hours * 100 + rng.integers(0, 10, 4000)}
    pq.write_table(pa.table(table), tmp_path / "clicks.parquet")
    schema = ClickLogSchema(
        name="clicks",
        sources=("clicks.parquet",),
        time="t",
        ids=("article",),
        negatives=NegativeSampling(("article",), per_positive=2, by_popularity=by_popularity),
    )
    log = prepare_schema(schema, [tmp_path / "clicks.parquet"], tmp_path / "log", progress=False)
    assert len(log) == 12_000 and log.labels.reshape(-1, 3).tolist() == [[1, 0, 0]] * 4000
    values = np.load(log.directory / "vocabulary_article.npy")[log._ids[:, 0] - 2]
    assert (values // 100 == log.times // 3600).all()
    own = values.reshape(-1, 3)
    assert (own[:, :1] != own[:, 1:]).all()
    assert roc_auc_score(log.labels, np.random.default_rng(1).random(12_000)) < 0.53
    again = prepare_schema(schema, [tmp_path / "clicks.parquet"], tmp_path / "two", progress=False)
    assert (again._ids == log._ids).all()
    pq.write_table(pa.table({k: v[::-1] for k, v in table.items()}), tmp_path / "back.parquet")
    with pytest.raises(ValueError, match="sort the source by time"):
        prepare_schema(schema, [tmp_path / "back.parquet"], tmp_path / "three", progress=False)


def test_negatives_by_popularity_occur_as_often_as_positives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    articles = rng.choice(50, 20_000, p=np.arange(1, 51) / 1275)
    table = {"t": np.zeros(20_000, np.int64), "article": articles}
    pq.write_table(pa.table(table), tmp_path / "clicks.parquet")
    for by_popularity, lowest in ((False, 0.4), (True, 0.0)):
        schema = ClickLogSchema(
            name="clicks", sources=("clicks.parquet",), time="t", ids=("article",),
            negatives=NegativeSampling(("article",), by_popularity=by_popularity),
        )  # fmt: skip
        target = tmp_path / str(by_popularity)
        log = prepare_schema(schema, [tmp_path / "clicks.parquet"], target, progress=False)
        ids, labels = log._ids[:, 0], log.labels.astype(bool)
        positive = np.bincount(ids[labels], minlength=52) / 20_000
        negative = np.bincount(ids[~labels], minlength=52) / 20_000
        assert (ids[labels] != ids[~labels]).all()
        assert lowest <= np.abs(positive - negative).sum() < lowest + 0.2


@pytest.mark.parametrize("name", ["globo", "globo_by_popularity", "criteo80k"])
def test_the_example_schemas_load(name: str) -> None:
    root = Path(__file__).parents[2]
    assert ClickLogSchema.load(root / "examples" / "schemas" / f"{name}.yaml").name == name
