"""Ranks, differences and their p-values, and reports of many methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from embcompress.bench.comparison import difference, rankings
from embcompress.bench.plots import _MOST_LINES, budget_figure
from embcompress.bench.records import Record
from embcompress.bench.settings import FULL_BUDGET, Run, TrainingSettings
from embcompress.bench.summary import Summary, load_records, summarize
from embcompress.bench.tables import (
    details_table,
    difference_table,
    markdown_lead,
    ranking_table,
    table_rows,
)
from tests.bench.test_summaries import TRAINING, record

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def impossible(method: str, budget: str, seed: int = 0) -> Record:
    return {
        "key": Run("synthetic", method, budget, seed, TRAINING).key,
        "status": "impossible", "data": "synthetic", "method": method, "budget": budget,
        "seed": seed, "smallest_bytes": 1234,
    }  # fmt: skip


def failed(method: str, budget: str, seed: int) -> Record:
    found = {**impossible(method, budget, seed), "status": "failed", "error": "E: no"}
    del found["smallest_bytes"]
    return found


def summary_of(records: list[Record]) -> Summary:
    (summary,) = summarize(records)
    return summary


def test_ranks_are_means_of_places_and_who_cannot_comes_last() -> None:
    summary = summary_of([
        record("full", FULL_BUDGET, 0, 0.80),
        record("hash", "10%", 0, 0.70), record("hash", "1%", 0, 0.60),
        record("qr", "10%", 0, 0.75), impossible("qr", "1%"),
        record("pq", "10%", 0, 0.75), failed("pq", "1%", 0),
        record("low_bit", "10%", 0, 0.79), record("low_bit", "1%", 0, 0.78),
    ])  # fmt: skip
    found = {each.method: each for each in rankings(summary)}
    assert list(found) == ["low_bit", "hash", "qr", "pq"]
    assert found["low_bit"].rank == 1 and found["hash"].rank == (4 + 2) / 2
    # Places 2 and 3 at 10 % are equal; places 3 and 4 at 1 % are shared.
    assert found["qr"].rank == found["pq"].rank == (2.5 + 3.5) / 2
    assert found["low_bit"].loss == pytest.approx(0.015)
    assert (found["qr"].met, found["qr"].budgets) == (1, 2)
    assert found["qr"].loss == pytest.approx(0.05)
    assert ranking_table(summary)[1][-1][3][0] == "1 of 2"


def test_the_lead_is_over_methods_without_files() -> None:
    records = [
        record("full", FULL_BUDGET, 0, 0.80), record("auto", "10%", 0, 0.78),
        record("qr", "10%", 0, 0.75), record("hash", "10%", 0, 0.70),
        {**record("offloaded", "10%", 0, 0.79), "offloaded_bytes": 1},
    ]  # fmt: skip
    text = markdown_lead({"log": summary_of(records)}, "auto")
    assert "| log | 10% | 0.8000 | 0.7800 | +0.0200 | qr 0.7500 | +0.0300 | 0.7000 |" in text


def test_a_lead_has_an_error_where_the_seeds_are_the_same() -> None:
    """Leads of 0.01 and 0.03 over qr, and so an error of 0.01."""
    records = [
        record("full", FULL_BUDGET, 0, 0.80),
        record("auto", "10%", 0, 0.77), record("auto", "10%", 1, 0.78),
        record("qr", "10%", 0, 0.76), record("qr", "10%", 1, 0.75),
    ]  # fmt: skip
    assert "| +0.0200 ± 0.0100 |" in markdown_lead({"log": summary_of(records)}, "auto")
    records.append(record("qr", "10%", 2, 0.70))
    assert "±" not in markdown_lead({"log": summary_of(records)}, "auto").split("qr")[1]


def test_budgets_that_were_not_run_do_not_count() -> None:
    summary = summary_of([
        record("hash", "10%", 0, 0.70), record("hash", "1%", 0, 0.60), record("qr", "10%", 0, 0.75)
    ])  # fmt: skip
    found = {each.method: each for each in rankings(summary)}
    assert found["qr"].rank == 1 and found["qr"].budgets == 1 and found["qr"].loss is None


def test_a_difference_is_paired_over_seeds() -> None:
    """Differences of 0.01, 0.02 and 0.03: t = 2 / √(1/3) with two degrees of freedom."""
    records = [record("hash", "10%", seed, auc) for seed, auc in enumerate((0.6, 0.7, 0.65))]
    records += [record("qr", "10%", 2, 0.68), record("qr", "10%", 0, 0.61),
                record("qr", "10%", 1, 0.72), record("qr", "10%", 7, 0.99)]  # fmt: skip
    summary = summary_of(records)
    found = difference(summary, "qr", "10%")
    assert found is not None and found.seeds == 3
    assert found.mean == pytest.approx(0.02)
    assert found.error == pytest.approx(0.01 / 3**0.5)
    assert found.p_value == pytest.approx(0.0741799, abs=1e-6)
    assert difference_table(summary)[1] == [[("qr", False), ("+0.0200 (p = 0.074)", False)]]
    assert difference(summary, "hash", "10%") is None


def test_one_seed_has_no_p_value() -> None:
    summary = summary_of([record("hash", "10%", 0, 0.6), record("qr", "10%", 0, 0.7)])
    found = difference(summary, "qr", "10%")
    assert found is not None and found.error is found.p_value is None
    assert difference_table(summary)[1][0][1][0] == "+0.1000"


def test_an_impossible_budget_shows_the_smallest_bytes() -> None:
    summary = summary_of([record("hash", "10%", 0, 0.6), impossible("qr", "10%")])
    assert table_rows(summary)[1][1][1][0] == "needs 13%"
    assert table_rows(summary, with_bytes=True)[1][1][1][0] == "≥ 13 % (1,234 bytes)"


def test_a_cell_says_how_many_of_its_runs_failed() -> None:
    summary = summary_of([record("hash", "10%", 0, 0.6), failed("hash", "10%", 1)])
    assert table_rows(summary)[1][0][1][0] == "0.6000 (1 failed)"


def test_details_come_by_budget_and_falling_quality() -> None:
    records = [record(method, budget, 0, auc) for method, budget, auc in (
        ("hash", "1%", 0.5), ("hash", "10%", 0.6), ("qr", "10%", 0.7))]  # fmt: skip
    records[0] |= {"training_bytes": 777, "lookup_microseconds": 3.0,
                   "full_lookup_microseconds": 2.0, "train_seconds": 1.25}  # fmt: skip
    header, rows = details_table(summary_of(records))
    assert [(row[0][0], row[1][0]) for row in rows] == [
        ("qr", "10%"),
        ("hash", "10%"),
        ("hash", "1%"),
    ]
    costs = dict(zip(header, (text for text, _ in rows[-1]), strict=True))
    assert costs["more in training"] == "777" and costs["× full tables"] == "1.50"
    assert [text for text, _ in rows[0]].count("–") == 4  # an earlier version's record


@pytest.mark.parametrize("name", ["movielens-100k", "criteo-80k", "globo", "synthetic-2m"])
def test_reports_of_earlier_records_can_be_made(name: str) -> None:
    for summary in summarize(load_records(RESULTS / name)):
        assert len(rankings(summary)) == len(summary.methods) - 1
        assert difference_table(summary)[1] and details_table(summary)[1]
        assert "model dlrm" in summary.description


def test_many_methods_are_grey_but_for_the_best() -> None:
    names = ["hash", "auto", *(f"method_{number}" for number in range(40))]
    records = [record("full", FULL_BUDGET, 0, 0.9)]
    records += [record(name, budget, 0, 0.5 + number / 200 + share)
                for number, name in enumerate(names)
                for budget, share in (("50%", 0.1), ("1%", 0.0))]  # fmt: skip
    assert len(names) > _MOST_LINES
    (axes,) = budget_figure(summary_of(records), "auc").axes
    labels = axes.get_legend_handles_labels()[1]
    assert {"hash", "auto", "full (100%)", "method_39", "34 others"} <= set(labels)
    assert len(labels) == 8 + 3 and "method_0" not in labels
    # The legend is beside the axes, not on the lines.
    assert axes.get_legend().get_bbox_to_anchor().x0 >= axes.bbox.x1


def test_a_summary_says_what_was_trained() -> None:
    training = TrainingSettings(model="dcn", learning_rates=(0.1,))
    summary = summary_of([record("hash", "10%", 0, 0.6, training)])
    assert summary.description == (
        "model dcn, width 16, random split, at most 8 epochs, batches of 512, learning rates 0.1"
    )
