"""Training one run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import embcompress as ec
from embcompress.bench import execution as execution_module
from embcompress.bench import training as training_module
from embcompress.bench.environment import torch_threads
from embcompress.bench.execution import checked_memory
from embcompress.bench.planning import PlanTrials, try_candidates
from embcompress.bench.prequential import SLICES, slice_scores, train_prequential
from embcompress.bench.records import RecordFile
from embcompress.bench.settings import Run, SweepSettings, TrainingSettings
from embcompress.bench.sweep import run_sweep
from embcompress.bench.training import (
    Trained,
    build_model,
    count_ids,
    deployed,
    evaluate,
    predict,
    score,
    train,
)
from embcompress.data import ClickLog, load_click_log
from embcompress.models import MODELS
from embcompress.planner.choosing import choose
from embcompress.planner.trial_data import TrialData
from embcompress.planner.trials import Trial
from embcompress.training.recipe import binary_step, make_optimizer
from tests.phased_method import Searched

DATA = "synthetic:rows=1500,ids=300,features=3"
SETTINGS = TrainingSettings(epochs=3, batch_size=128, learning_rates=(0.03,))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ClickLog:
    return load_click_log(DATA, cache=tmp_path_factory.mktemp("cache"), progress=False)


def trained(log: ClickLog, method: str = "qr", seed: int = 0) -> Trained:
    model = build_model(log, SETTINGS, method, "50%", seed)
    return train(model, log, log.split("random", seed=seed), SETTINGS, 0.03, seed)


def test_a_seed_decides_everything_and_threads_nothing(log: ClickLog) -> None:
    first = trained(log)
    with torch_threads(2):
        again = trained(log)
    assert first.validation == again.validation
    assert first.validation != trained(log, seed=1).validation


def test_test_rows_are_not_looked_at_while_training(
    log: ClickLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, seen = log.split("random", seed=0), []
    batch = log.batch
    monkeypatch.setattr(log, "batch", lambda rows: (seen.append(rows), batch(rows))[1])
    model = build_model(log, SETTINGS, "hash", "50%", 0)
    result = train(model, log, split, SETTINGS, 0.03, 0)
    assert not np.isin(np.concatenate(seen), split.test).any()
    seen.clear()
    scores = training_module.test_scores(result, log, split.test)
    assert set(scores) == {1, result.best_epoch}
    assert np.isin(np.concatenate(seen), split.test).all()


def test_the_scores_are_those_of_the_kept_epochs(log: ClickLog) -> None:
    split, result = log.split("random", seed=0), trained(log)
    validation = training_module.test_scores(result, log, split.validation)
    for epoch, found in validation.items():
        assert found == result.validation[epoch - 1]


def test_a_training_that_diverges_is_the_worst_and_not_an_error(log: ClickLog) -> None:
    model = build_model(log, SETTINGS, "full", "100%", 0)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    score = evaluate(model, log, log.split("random").test)
    assert (score.auc, score.logloss) == (0.0, float("inf"))


def test_rows_of_one_label_have_no_auc(log: ClickLog) -> None:
    model = build_model(log, SETTINGS, "full", "100%", 0)
    with pytest.raises(ValueError, match="all 5 rows to be evaluated have the label 1"):
        evaluate(model, log, np.flatnonzero(log.labels == 1)[:5])


def test_a_prequential_prediction_is_made_before_its_row_is_trained_on(log: ClickLog) -> None:
    settings = replace(SETTINGS, split="prequential")
    split = log.split("time", validation=0.3, test=0.3)
    model = build_model(log, settings, "low_bit", "20%", 0)
    result = train_prequential(model, log, split, settings, 0.03)
    again = build_model(log, settings, "low_bit", "20%", 0)
    optimizer = make_optimizer(again, 0.03)
    predictions = []
    for start in range(0, len(log), settings.batch_size):
        rows = np.arange(start, min(start + settings.batch_size, len(log)))
        predictions.append(predict(again, log, rows))  # the whole model, in evaluation mode
        again.train()
        batch = log.batch(rows)
        binary_step(optimizer, again(batch.dense, batch.ids, batch.offsets), batch.label)
    probability = np.concatenate(predictions).astype(np.float64)
    assert result.validation == [score(log.labels[split.validation], probability[split.validation])]
    assert result.prequential == score(log.labels[split.test], probability[split.test])
    scores = training_module.test_scores(result, log, split.test)
    assert scores == {1: result.prequential} and result.examples == len(log)
    # Over time: the same predictions in equal parts, all of them.
    assert len(result.over_time) == SLICES
    first = np.array_split(np.arange(len(log)), SLICES)[0]
    rows = np.concatenate([split.train, split.validation, split.test])[first]
    assert result.over_time[0] == score(log.labels[rows], probability[rows])


def test_parts_of_one_label_have_no_score() -> None:
    labels = np.array([0, 1, 0, 0, 1, 0], np.uint8)
    over_time = slice_scores(labels, np.linspace(0, 1, 6), 3)
    assert [None if each is None else each.auc for each in over_time] == [1.0, None, 0.0]
    assert slice_scores(labels, np.linspace(0, 1, 6), 9)[6:] == [None] * 3


def test_the_planner_sees_no_test_rows(log: ClickLog, monkeypatch: pytest.MonkeyPatch) -> None:
    split, seen, batch = log.split("time"), [], log.batch
    monkeypatch.setattr(log, "batch", lambda rows: (seen.append(rows), batch(rows))[1])
    settings = replace(SETTINGS, split="time")
    counts = count_ids(log, split.train)
    tried = try_candidates(log, split, settings, "auto", "5%", counts, 60)
    assert len(tried) > 1 and tried[0].passes >= 1
    assert not np.isin(np.concatenate(seen), split.test).any()
    assert [each.method for each in tried] == [
        each.method for each in try_candidates(log, split, settings, "auto", "5%", counts, 60)
    ]


@pytest.mark.parametrize("kind", ["time", "prequential"])
def test_trials_know_no_ids_of_later_rows(log: ClickLog, kind: str) -> None:
    split, settings = log.split("time"), replace(SETTINGS, split=kind)
    trials = PlanTrials(log, split, settings, count_ids(log, split.train))
    part = trials.data.earlier()
    assert part is not None and part.examples < trials.data.examples
    half = split.train[: len(split.train) // 2]
    later = len(split.train) - trials.data.examples  # rows that are held out
    for data in (trials.data, part):
        known = split.train[: data.examples + later] if kind == "time" else half
        expected = build_model(log, settings, ec.Pruned(), "20%", 0, count_ids(log, known))
        size = ec.memory(expected).total
        found = trials.build(ec.Pruned(), size, data).state_dict()
        assert all(torch.equal(found[k], v) for k, v in expected.state_dict().items())


def test_a_record_says_what_the_tables_were_made_into(log: ClickLog, tmp_path: Path) -> None:
    settings = SweepSettings((DATA,), ("hash",), ("20%",), (0,), SETTINGS)
    run_sweep(settings, tmp_path, cache=log.directory.parent, quiet=True)
    (record,) = RecordFile(tmp_path / "results.jsonl")
    model = build_model(log, SETTINGS, "hash", "20%", 0)
    assert record["bytes"] == ec.memory(model).total <= record["budget_bytes"]
    assert sum(table["bytes"] for table in record["lookup"]) == record["bytes"]
    assert record["hardware"]["threads"] == 1


def test_a_method_that_breaks_its_budget_is_caught(log: ClickLog) -> None:
    model = build_model(log, SETTINGS, "full", "100%", 0)
    with pytest.raises(AssertionError, match="its budget is"):
        checked_memory(Run(DATA, "full", "10%", 0, replace(SETTINGS)), model)


@pytest.mark.parametrize("model", MODELS)
def test_a_sweep_of_every_model(log: ClickLog, tmp_path: Path, model: str) -> None:
    settings = SweepSettings((DATA,), ("hash",), ("20%",), (0,), replace(SETTINGS, model=model))
    run_sweep(settings, tmp_path, cache=log.directory.parent, quiet=True)
    (record,) = RecordFile(tmp_path / "results.jsonl")
    assert record["model"] == record["settings"]["model"] == model
    assert json.loads(record["key"])["training"]["model"] == model
    assert record["auc"] > 0.5


def test_layers_start_alike_whatever_the_tables_are(log: ClickLog) -> None:
    one, other = (build_model(log, SETTINGS, method, "20%", 4) for method in ("hash", "low_bit"))
    layers = {name: p for name, p in one.named_parameters() if not name.startswith("embeddings")}
    assert layers
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in layers.items())


def test_rows_come_in_one_order_whatever_the_method_is(
    log: ClickLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, orders = log.batch, {}
    for method, seed in (("hash", 0), ("low_bit", 0), ("hash", 1)):
        seen: list[np.ndarray] = []
        monkeypatch.setattr(
            log, "batch", lambda rows, seen=seen: (seen.append(rows), batch(rows))[1]
        )
        model = build_model(log, SETTINGS, method, "20%", seed)
        train(model, log, log.split("random", seed=seed), replace(SETTINGS, epochs=2), 0.03, seed)
        orders[method, seed] = np.concatenate(seen)
    assert np.array_equal(orders["hash", 0], orders["low_bit", 0])
    assert not np.array_equal(orders["hash", 0], orders["hash", 1])


@dataclass(frozen=True)
class PhasedSearch(Searched):
    """A method that asks for the validation score, too."""

    name: ClassVar[str] = "phased_search"
    needs_score: bool = True


def test_phases_run_before_the_epochs_that_are_scored(log: ClickLog) -> None:
    model = build_model(log, SETTINGS, PhasedSearch(), "50%", 0)
    split = log.split("random", seed=0)
    result = train(model, log, split, SETTINGS, 0.03, 0)
    assert [(each.name, each.epochs) for each in result.phases] == [
        ("search", 2),
        ("retrain", len(result.validation)),
    ]
    assert result.examples == len(split.train) * (2 + len(result.validation))
    search, retrain = (each.training_bytes for each in result.phases)
    dense = ec.memory(model).dense
    assert search > 1.5 * dense - ec.memory(model).total and 0 < retrain < dense
    for epoch in result.guard.states:
        assert deployed(result, epoch).embeddings.embedding_bags["t_id_0"].plan.head is not None
    again = train(
        build_model(log, SETTINGS, PhasedSearch(), "50%", 0), log, split, SETTINGS, 0.03, 0
    )
    assert again.validation == result.validation


def test_phases_of_a_prequential_run_see_training_rows_alone(
    log: ClickLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, seen = log.split("time"), []
    batch = log.batch
    monkeypatch.setattr(log, "batch", lambda rows: (seen.append(rows), batch(rows))[1])
    model = build_model(log, SETTINGS, PhasedSearch(), "50%", 0)
    result = train_prequential(model, log, split, SETTINGS, 0.03)
    assert [(each.name, each.epochs) for each in result.phases] == [("search", 2), ("retrain", 1)]
    rows = np.concatenate([split.train, split.validation, split.test])
    count = -(-len(rows) // SETTINGS.batch_size)
    assert np.array_equal(np.concatenate(seen[-count:]), rows)
    assert set(np.concatenate(seen[:-count])) == set(split.train)


def test_short_trainings_run_the_phases(log: ClickLog) -> None:
    rows = log.split("random", seed=0).train
    data = TrialData.of(
        ((batch.dense, batch.ids, batch.offsets), batch.label)
        for batch in (log.batch(rows[start : start + 64]) for start in range(0, 640, 64))
    )
    methods = [PhasedSearch(), ec.LowDim()]
    trials = choose(
        methods, lambda method, data: build_model(log, SETTINGS, method, "50%", 0), data, 100.0
    )
    assert all(trial.passes > 0 and trial.auc > 0 for trial in trials)


def test_seeds_of_the_same_rows_have_one_plan(
    log: ClickLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []

    def tried(log: ClickLog, rows: object, settings: TrainingSettings, *_: object) -> list[Trial]:
        planned.append(settings.split)
        return [Trial(ec.LowDim())]

    monkeypatch.setattr(execution_module, "try_candidates", tried)
    executor = execution_module.Executor(log.directory.parent, 60)
    for split in ("time", "random"):
        settings = replace(SETTINGS, split=split)
        for seed in (0, 1):
            rows = log.split(split, seed=seed)  # type: ignore[arg-type]
            executor.planned(Run(DATA, "low_dim", "50%", seed, settings), log, rows, {})
    assert planned == ["time", "random", "random"]
