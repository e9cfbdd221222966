"""What a run's record says of bytes in training and of the time of lookups."""

from __future__ import annotations

from dataclasses import replace

import pytest

import embcompress as ec
from embcompress.bench import lookup as lookup_module
from embcompress.bench.lookup import LookupTimer
from embcompress.bench.settings import TrainingSettings
from embcompress.bench.training import build_model, count_ids, train
from embcompress.data import ClickLog, load_click_log
from embcompress.models import ClickModel

DATA = "synthetic:rows=1500,ids=300,features=3"
SETTINGS = TrainingSettings(epochs=2, batch_size=128)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ClickLog:
    return load_click_log(DATA, cache=tmp_path_factory.mktemp("cache"), progress=False)


def training_bytes(log: ClickLog, method: str | ec.Method) -> tuple[int, int, ClickModel]:
    """Bytes at lookup, the most beyond them in training, and the model."""
    split = log.split("random", seed=0)
    counts = count_ids(log, split.train)
    model = build_model(log, SETTINGS, method, "20%", 0, counts)
    size = ec.memory(model).total
    held = train(model, log, split, SETTINGS, 0.03, 0).training_bytes
    return size, held, model


def test_adagrad_keeps_a_number_for_every_number(log: ClickLog) -> None:
    size, in_training, _ = training_bytes(log, "hash")
    assert size < in_training < size + 16 * len(log.features)  # and numbers of steps


def test_latents_of_low_bit_rows_are_counted(log: ClickLog) -> None:
    size, in_training, _ = training_bytes(log, "int8")
    assert in_training > 5 * size  # 3 + 4 bytes more of latents and state for a byte


def test_tensors_of_procedures_are_counted(log: ClickLog) -> None:
    """Pruning keeps an importance for every id, and no optimizer has state of codes."""
    _, in_training, model = training_bytes(log, ec.Pruned(interval=5))
    bags = list(model.embeddings.embedding_bags.values())
    assert all(bag.method == "pruned" for bag in bags)
    numbers = sum(4 * bag.weight.numel() for bag in bags)
    ids = sum(bag.num_embeddings for bag in bags)
    assert in_training >= numbers + 4 * ids


def test_lookups_are_timed_in_turn_with_full_tables(
    log: ClickLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer, order = LookupTimer(log, 16), []
    tables = build_model(log, SETTINGS, "hash", "20%", 0).embeddings
    measured = timer._round
    monkeypatch.setattr(timer, "_round", lambda t: (order.append(t), measured(t))[1])
    found = timer.measure(tables)
    assert found.microseconds > 0 and found.full is not None and found.full > 0
    assert order[::2] == [tables] * (len(order) // 2)
    assert order[1::2] == [timer.full] * (len(order) // 2)
    assert timer.lookups == len(log.batch(slice(None)).ids)


def test_the_time_is_that_of_a_thousand_lookups(
    log: ClickLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = LookupTimer(log, 16)
    seconds = {id(timer.full): [2.0, 9.0, 2.0], 0: [1.0, 3.0, 1.0]}  # and a warming first round
    monkeypatch.setattr(lookup_module, "_ROUNDS", 2)
    monkeypatch.setattr(timer, "_round", lambda t: seconds[id(t) if t is timer.full else 0].pop())
    found = timer.measure(build_model(log, SETTINGS, "hash", "20%", 0).embeddings)
    assert found.microseconds == pytest.approx(2.0 * 1e9 / timer.lookups)
    assert found.full == pytest.approx(5.5 * 1e9 / timer.lookups)


def test_large_full_tables_are_not_built(log: ClickLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_module, "_LARGEST_FULL", 1000)
    timer = LookupTimer(log, 16)
    model = build_model(log, replace(SETTINGS, model="dcn"), "hash", "20%", 0)
    assert timer.full is None and timer.measure(model.embeddings).full is None
