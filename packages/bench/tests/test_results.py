import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phyla.bench.compare import changes
from phyla.bench.results import Board, Measurement, Metric, Outcome, PipelineResult, ResultsError, Run, read_run, to_json

ACCURACY = Metric("accuracy", "%")
ERROR = Metric("error", better="lower", scale="log")


def a_run(*boards):
    result = PipelineResult("title", "about", (0,), boards)
    return Run("2026-01-02T03:04:05+00:00", 1.0, "quick", 0, 1, {"Python": "3"}, {"torch": "2"}, {}, (Outcome("p", "passed", 1.0, result),))


def board(metric, *scores):
    return Board("b", metric, (Measurement("m", scores, 10, 1.0, 2.0),))


def verdict(metric, before, after):
    (change,) = changes(a_run(board(metric, *before)), a_run(board(metric, *after)))
    return change.verdict


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(scores=st.lists(numbers, max_size=4), text=st.text(), parameters=st.integers(0, 10**12), peak=st.none() | numbers)
def test_a_run_is_read_back_as_it_was_written(tmp_path_factory, scores, text, parameters, peak):
    measurement = Measurement(text, tuple(scores), parameters, 0.5, peak, task=text, baseline=bool(scores), recipe=text)
    run = dataclasses.replace(a_run(Board(text, ERROR, (measurement,))), environment={text: text})
    path = tmp_path_factory.getbasetemp() / "round.json"
    path.write_text(to_json(run), encoding="utf-8")
    assert read_run(path) == run


def test_not_a_number_survives_as_null(tmp_path):
    path = tmp_path / "nan.json"
    path.write_text(to_json(a_run(board(ACCURACY, math.nan, math.inf, 1.0))))
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    (measurement,) = read_run(path).outcomes[0].result.boards[0].measurements
    assert [math.isnan(score) for score in measurement.scores] == [True, True, False]


@given(st.data())
def test_no_damaged_file_gives_anything_but_a_results_error(tmp_path_factory, data):
    text = to_json(a_run(board(ACCURACY, 1.0, 2.0)))
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    path = Path(tmp_path_factory.getbasetemp() / "damaged.json")
    path.write_text(text[:start] + data.draw(st.text(max_size=10)) + text[stop:], encoding="utf-8", errors="replace")
    try:
        read_run(path)
    except ResultsError as error:
        assert "damaged.json" in str(error)


def test_spread_is_the_sample_standard_deviation():
    measurement = Measurement("m", (1.0, 2.0, 4.0), 1, 1.0)
    assert measurement.mean == pytest.approx(7 / 3)
    assert measurement.deviation == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(Measurement("m", (1.0,), 1, 1.0).deviation)


@pytest.mark.parametrize(
    ("metric", "mean", "deviation", "text"),
    [
        (ACCURACY, 95.04, 0.26, "95.0 ± 0.3"),
        (ACCURACY, 95.0, math.nan, "95.0"),
        (ACCURACY, math.nan, math.nan, "diverged"),
        (ERROR, 0.00123, 0.00046, "(1.2 ± 0.5)e-03"),
        (ERROR, 0.0, 0.0, "(0.0 ± 0.0)e+00"),
        (ERROR, 12.0, math.nan, "1.2e+01"),
    ],
)
def test_how_scores_are_shown(metric, mean, deviation, text):
    assert metric.show_spread(mean, deviation) == text


def test_best_ignores_what_diverged_and_follows_the_metric():
    rows = (Measurement("a", (1.0,), 1, 1.0), Measurement("b", (math.nan,), 1, 1.0), Measurement("c", (2.0,), 1, 1.0))
    assert Board("", ACCURACY, rows).best("").model == "c"
    assert Board("", ERROR, rows).best("").model == "a"
    assert Board("", ERROR, rows[1:2]).best("") is None


def test_unequal_budgets_are_refused():
    rows = [Measurement("a", (1.0,), 1000, 1.0), Measurement("b", (1.0,), 1049, 1.0), Measurement("c", (1.0,), 960, 1.0)]
    Board("sizes", ACCURACY, tuple(rows)).require_equal_budget()
    rows[1] = Measurement("b", (1.0,), 1051, 1.0)
    with pytest.raises(ValueError, match=r"b: expected 1000 parameters up to 5% on 'sizes', got 1051"):
        Board("sizes", ACCURACY, tuple(rows)).require_equal_budget()


def test_verdicts_of_a_comparison():
    assert verdict(ACCURACY, (90.0, 91.0, 92.0), (90.5, 91.5, 92.0)) == "same"
    assert verdict(ACCURACY, (90.0, 91.0, 92.0), (95.0, 96.0, 97.0)) == "better"
    assert verdict(ERROR, (1.0, 1.1), (2.0, 2.1)) == "worse"
    assert verdict(ERROR, (1.0,), (1.04,)) == "same"
    assert verdict(ERROR, (1.0,), (1.1,)) == "worse"
    assert verdict(ERROR, (1.0,), (math.nan,)) == "worse"
    assert verdict(ERROR, (math.nan,), (1.0,)) == "better"
    assert verdict(ERROR, (math.nan,), (math.nan,)) == "same"


def test_costs_are_compared_as_ratios():
    slow = Board("b", ACCURACY, (Measurement("m", (1.0,), 10, 3.0, None),))
    (change,) = changes(a_run(board(ACCURACY, 1.0)), a_run(slow))
    assert change.step_ratio == 3.0
    assert math.isnan(change.memory_ratio)
