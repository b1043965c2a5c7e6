"""The real pipelines at a tiny size: what they compute is right before anyone waits for a full run."""

import math

import numpy as np
import pytest
import torch
from scipy import special
from torch import nn

from phyla.bench import digits
from phyla.bench.measure import count_parameters
from phyla.bench.pipelines import curves, images, sequences

QUIET = id  # a progress callback that does nothing


@pytest.mark.parametrize("inputs", sorted({inputs for inputs, _ in curves.FUNCTIONS.values()}))
def test_curve_models_have_equal_budgets(inputs):
    for model in curves.MODELS:
        network = model.build(inputs)
        assert count_parameters(network) == pytest.approx(curves.budget(inputs), rel=0.05), model.name
        assert network(torch.zeros(3, inputs)).shape == (3, 1)


def test_image_models_have_equal_budgets():
    counts = {}
    for model in images.MODELS:
        network = model.build()
        counts[model.name] = count_parameters(network)
        assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10), model.name
    middle = sorted(counts.values())[len(counts) // 2]
    assert {name: count for name, count in counts.items() if abs(count - middle) > 0.05 * middle} == {}


def test_the_seven_functions():
    x = np.array([[0.3, -0.4, 0.5, 0.2]])
    expected = {
        "sin(5 pi x)": math.sin(5 * math.pi * 0.3),
        "exp(sin(pi x) + y^2)": math.exp(math.sin(math.pi * 0.3) + 0.16),
        "x y": -0.12,
        "J0(20x)": special.jv(0, 6.0),
        "tanh(20 (x - 0.2))": math.tanh(2.0),
        "|x + y|": 0.1,
        "exp((sin(pi (x1^2 + x2^2)) + sin(pi (x3^2 + x4^2))) / 2)": math.exp((math.sin(math.pi * 0.25) + math.sin(math.pi * 0.29)) / 2),
    }
    assert expected.keys() == curves.FUNCTIONS.keys()
    for name, (inputs, formula) in curves.FUNCTIONS.items():
        assert formula(x[:, :inputs])[0] == pytest.approx(expected[name]), name


@pytest.mark.parametrize("model", [model.name for model in curves.MODELS])
def test_a_curve_is_learned(model):
    found = curves.train_curve(QUIET, "exp(sin(pi x) + y^2)", model, (0, 1), (3e-2,), 200)
    assert max(found.errors) < 0.6
    assert found.parameters == pytest.approx(curves.budget(2), rel=0.05)


def test_a_trial_repeats_and_picks_the_better_rate():
    first, again = (curves.train_curve(QUIET, "sin(5 pi x)", "Fourier KAN", (0,), (1e-7, 3e-2), 30) for _ in range(2))
    assert first.rate == 3e-2
    assert (first.errors, first.drawn) == (again.errors, again.drawn)
    assert len(first.drawn) == 401


@pytest.fixture(scope="module")
def bars():
    """Pixels and labels of 5,000 pictures that anything learns: a bright bar whose place is the digit."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 5000)
    pixels = generator.integers(0, 60, (5000, 28, 28), dtype=np.uint8)
    for digit in range(10):
        pixels[labels == digit, 2 + 2 * digit : 5 + 2 * digit] += 180
    return pixels.reshape(5000, 784), labels


@pytest.mark.parametrize("model", images.MODELS, ids=lambda model: model.name)
def test_digits_are_learned(model, bars):
    found = images.learn(QUIET, model.name, *bars, (0,), (1e-2,), 60)
    assert found.accuracies[0] > 60
    assert len(found.curves[0]) == images.CURVE_POINTS
    assert found.curves[0][-1] == found.accuracies[0]


def test_a_trial_of_digits_repeats_and_picks_the_better_rate(bars):
    first, again = (images.learn(QUIET, "MLP", *bars, (1,), (1e-7, 1e-2), 20) for _ in range(2))
    assert first.rate == 1e-2
    assert first.accuracies == again.accuracies


def test_the_digits_are_complete():
    pixels, labels = digits.mnist()
    x, y = digits.tensors(pixels, labels)
    assert x.shape == (5000, 1, 28, 28)
    assert (x.min(), x.max()) == (-1, 1)
    assert y.bincount().tolist() == [500] * 10


def test_splits_do_not_overlap_and_follow_the_seed():
    train, test = digits.split(5000, 3)
    assert (len(train), len(test)) == (digits.TRAIN, 1000)
    assert len(torch.cat((train, test)).unique()) == 5000
    assert not torch.equal(test, digits.split(5000, 4)[1])


def test_a_formula_is_read():
    reading = curves.read_formula(QUIET, 0, 8)
    assert "exp(" in reading.formula
    assert "sin(" in reading.formula or "cos(" in reading.formula
    assert reading.r2 > 0.99
    assert reading.formula_error < 0.05


@pytest.mark.parametrize("task", sequences.TASKS, ids=lambda task: task.name)
def test_sequence_models_have_equal_budgets(task):
    for model in task.models:
        network = sequences.network(model.mixer, task.tokens, task.width, 1, task.parameters)
        assert count_parameters(network) == pytest.approx(task.parameters, rel=0.05), model.name
        inputs, targets = task.draw(2, task.length)
        assert inputs.max() < task.tokens
        assert targets.max() < task.tokens
        assert network(inputs)[0].shape == (2, task.length, task.tokens)
        assert task.scored in task.lengths


@pytest.mark.parametrize("size", sequences.WRITER_SIZES)
def test_language_models_have_equal_budgets(size):
    width, parameters = size
    for model in sequences.WRITERS:
        network = sequences.network(model.mixer, 103, width, sequences.DEPTH, parameters)
        assert count_parameters(network) == pytest.approx(parameters, rel=0.05), model.name


@pytest.mark.parametrize("model", ["DeltaProduct, n = 1", "GRU"])
def test_parity_is_learned_with_negative_eigenvalues_and_without_linearity(model):
    found = sequences.learn(QUIET, "parity", model, (0,), (1e-2,), 150)
    assert found.accuracies[0][0] > 99
    assert len(found.accuracies[0]) == 6


def test_a_sequence_trial_repeats_and_picks_the_better_rate():
    first, again = (sequences.learn(QUIET, "parity", "Mamba-2", (3,), (1e-7, 1e-2), 20) for _ in range(2))
    assert first.rate == 1e-2
    assert first.accuracies == again.accuracies


@pytest.mark.parametrize("model", sequences.WRITERS, ids=lambda model: model.name)
def test_a_language_model_learns_and_writes(model):
    found = sequences.write(QUIET, model.name, 16, 20_000, (0,), (1e-2,), 30)
    assert 3.0 < found.bits[0] < 4.95  # counting single characters gives 4.9
    assert len(found.sample) == sequences.SAMPLE
    assert found.character_ms > 0


def test_bits_per_character_carry_the_state_from_window_to_window():
    class Sum(nn.Module):
        """Knows the running sum modulo 4 of everything it read, which is the next character, and is sure to 99 %."""

        def forward(self, ids, state=None):
            total = ids.cumsum(1) + (0 if state is None else state)
            chance = 0.99 * nn.functional.one_hot(total % 4, 4) + 0.01 / 4
            return chance.log(), total[:, -1:]

    streams, length = sequences.STREAMS, 1 + 5 * sequences.WINDOW
    rows = torch.randint(4, (streams, length), generator=torch.Generator().manual_seed(0))
    for t in range(1, length):
        rows[:, t] = rows[:, :t].sum(1) % 4
    expected = -math.log2(0.99 + 0.01 / 4)
    assert sequences.bits_per_character(Sum(), rows.flatten()) == pytest.approx(expected, rel=1e-5)
