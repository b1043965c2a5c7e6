"""The pipeline of binary networks at a tiny size, and how it arranges what the trials found."""

import math

import numpy as np
import pytest
import torch

from phyla.bench import Context
from phyla.bench.measure import count_parameters
from phyla.bench.pipelines import binary
from phyla.bench.report import render
from phyla.bench.results import Outcome, Run
from phyla.bench.sandbox import Measured
from phyla.quantized import summarize

QUIET = id  # a progress callback that does nothing
NAMES = [model.name for model in binary.MODELS]


@pytest.fixture(scope="module")
def bars():
    """Pixels and labels of 5,000 pictures that anything learns: a bright bar whose place is the digit."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 5000)
    pixels = generator.integers(0, 60, (5000, 28, 28), dtype=np.uint8)
    for digit in range(10):
        pixels[labels == digit, 2 + 2 * digit : 5 + 2 * digit] += 180
    return pixels.reshape(5000, 784), labels


@pytest.mark.parametrize("width", [8, 16, 32])
def test_binary_models_have_equal_budgets(width):
    counts = {}
    for model in binary.MODELS:
        network = binary.network(width, model.binary)
        counts[model.name] = count_parameters(network)
        assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10), model.name
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts


def test_nearly_all_parameters_are_binary_weights():
    model = next(each for each in binary.MODELS if each.name == binary.CHOSEN)
    summary = summarize(binary.network(32, model.binary), (1, 1, 28, 28))
    assert summary.binary_parameters >= 0.98 * (summary.binary_parameters + summary.float_parameters)


@pytest.mark.parametrize("epochs", [3, 12, 13])
def test_every_recipe_takes_equally_many_epochs(epochs):
    for model in binary.MODELS:
        stages = model.stages(0.5, epochs)
        assert sum(stage.epochs for stage in stages) == epochs
        assert stages[0].lr == 0.5
        assert all((stage.batch_size, stage.warmup) == (binary.BATCH, 0) for stage in stages)
        if len(stages) == 2:
            assert stages[0].epochs == pytest.approx(2 * stages[1].epochs, abs=1.5)
            assert stages[1].lr / stages[0].lr == pytest.approx(0.0037 / 0.021)


@pytest.mark.parametrize("name", NAMES)
def test_bars_are_learned_and_packed(name, bars):
    found = binary.learn(QUIET, name, *bars, (0,), (0.1,), 8, 3, 1920)
    assert found.accuracies[0] > 60
    assert len(found.curves[0]) == 3
    assert found.step_ms > 0
    if name == "float":
        assert found.packed is None
        return
    packed = found.packed
    assert packed.identical
    assert packed.accuracy == packed.graph_accuracy == found.accuracies[0]
    assert packed.bytes < packed.float_bytes / 3  # at this width half of the file is its header
    assert min(*packed.ms, *packed.float_ms) > 0
    if name.startswith("BiPer"):
        assert found.switch[0][0] == found.curves[0][1]
        assert len(found.switch[0]) == 2
    else:
        assert found.switch == ((),)


def test_a_trial_repeats_and_picks_the_better_rate(bars):
    first, again = (binary.learn(QUIET, "BiPer, frequency 60", *bars, (3,), (1e-6, 0.1), 8, 3, 320) for _ in range(2))
    assert first.rate == 0.1
    assert (first.curves, first.switch) == (again.curves, again.switch)


class Told(Context):
    """A context whose trials find what the test says."""

    def trial(self, label, function, name, *arguments):
        model, seeds, epochs = next(each for each in binary.MODELS if each.name == name), arguments[2], arguments[5]
        two, last = len(model.recipe) == 2, 90.0 + binary.MODELS.index(model)
        curves = tuple(tuple(np.linspace(50, last, epochs)) for _ in seeds)
        packed = None if model.binary is None else binary.Packed(last, last, name != "ReCU", 1_500_000, 60_000, (0.9, 20.0), (0.45, 4.0))
        switch = tuple((80.0, 70.0 + seed) if two else () for seed in seeds)
        return Measured(binary.Learned(0.1, curves, switch, 1000, 5.0, packed), 12.0)


class Silent:
    """Watches nothing."""

    def trials(self, count):
        assert count == len(NAMES)


def test_what_the_trials_found_is_arranged():
    result = binary.run(Told(False, 4, 2, Silent()))
    accuracy, ablation = result.boards
    assert accuracy.models == ("float", "sign, straight through", "ReCU", "IR-Net", "BiPer, frequency 20")
    assert [each.baseline for each in accuracy.measurements] == [True, False, False, False, False]
    assert accuracy.find("", "ReCU").scores == (92.0, 92.0)
    assert ablation.tasks == binary.STAGES
    assert ablation.find(binary.STAGES[0], "BiPer, frequency 5").scores == (80.0, 80.0)
    assert ablation.find(binary.STAGES[1], "BiPer, frequency 5").scores == (74.0, 75.0)
    assert ablation.find(binary.STAGES[2], "BiPer, frequency 60").scores == (96.0, 96.0)
    line = result.charts[1].lines[0]
    assert line.x == (1, 2, 2, 3)
    assert line.y == pytest.approx((50, 72, 74.5, 94))
    (table,) = result.tables
    assert all(len(row) == len(table.header) for row in table.rows)
    assert table.rows[0] == (
        NAMES[1],
        "91.0 %",
        "91.0 %",
        "yes",
        "1,500 kB",
        "60 kB",
        "0.90 ms",
        "0.45 ms",
        "2.0 x",
        "20.00 ms",
        "4.00 ms",
        "5.0 x",
    )
    assert table.rows[1][3] == "NO"
    run = Run("2020-01-01T00:00:00+00:00", 1.0, "quick", 4, 2, {}, {}, {}, (Outcome("binary", "passed", 1.0, result),))
    assert "3 epochs" in render(run)
    assert not any(math.isnan(each.mean) for board in result.boards for each in board.measurements)
