import itertools
import math

import pytest
import torch
from torch import nn

from phyla.bench.measure import StepClock, at_the_best_rate, count_parameters, nearest_widths, shuffled, train


def squares(model, rows):
    x = rows.float().unsqueeze(1)
    return (model(x) - 2 * x - 1).square().mean()


def test_training_finds_the_line_and_times_every_step():
    torch.manual_seed(0)
    model, seen = nn.Linear(1, 1), []
    clock = train(model, squares, itertools.repeat(torch.arange(4)), steps=300, rate=0.1, after_step=seen.append)
    assert model.weight.item() == pytest.approx(2, abs=0.02)
    assert model.bias.item() == pytest.approx(1, abs=0.02)
    assert seen == list(range(1, 301))
    assert len(clock.seconds) == 300
    assert 0 < clock.median_ms < 1000


def test_training_stops_when_the_loss_is_not_finite():
    seen = []
    train(
        nn.Linear(1, 1),
        lambda model, rows: squares(model, rows) / 0,
        itertools.repeat(torch.arange(4)),
        steps=50,
        rate=0.1,
        after_step=seen.append,
    )
    assert seen == []


def test_weight_decay_leaves_biases_and_norms_alone():
    def final(decay):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1))
        train(
            model,
            lambda net, rows: 0 * net(rows.float().unsqueeze(1)).sum(),
            itertools.repeat(torch.arange(4)),
            steps=50,
            rate=0.1,
            weight_decay=decay,
        )
        return [parameter.detach().abs().sum().item() for parameter in model.parameters()]

    plain, decayed = final(0.0), final(0.5)
    assert decayed[0] < 0.9 * plain[0]
    assert decayed[1:] == plain[1:]


def test_the_rate_of_the_lowest_finite_loss_trains_every_seed():
    losses, told = {0.1: math.nan, 0.2: 3.0, 0.3: 2.0, 0.4: -math.inf}, []

    def loss(rate, progress):
        progress(0.5)
        return losses[rate]

    def final(seed, rate, progress):
        progress(1.0)
        return seed, rate

    found = at_the_best_rate(loss, final, rates=tuple(losses), seeds=(7, 8), progress=told.append)
    assert found == (0.3, [(7, 0.3), (8, 0.3)])
    assert told == pytest.approx([0.5 / 6, 1.5 / 6, 2.5 / 6, 3.5 / 6, 5 / 6, 1.0])


def test_a_single_rate_is_taken_untried():
    def loss(rate, progress):
        raise AssertionError

    assert at_the_best_rate(loss, lambda seed, rate, _: (seed, rate), rates=(0.1,), seeds=(1,), progress=id) == (0.1, [(1, 0.1)])


def test_an_epoch_holds_every_sample_once_and_follows_the_seed():
    first, again, other = (list(itertools.islice(shuffled(10, 3, seed=seed), 6)) for seed in (0, 0, 1))
    assert [len(batch) for batch in first] == [3] * 6
    epoch = torch.cat(first[:3])
    assert len(epoch.unique()) == 9
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))


def test_nearest_widths_and_parameter_count_agree():
    a, b = nearest_widths(lambda a, b: 4 * a + (a + 1) * b + b + 1, 367, range(2, 40))
    model = nn.Sequential(nn.Linear(3, a), nn.Linear(a, b), nn.Linear(b, 1))
    assert count_parameters(model) == 4 * a + (a + 1) * b + b + 1
    assert abs(count_parameters(model) - 367) <= 5
    assert max(a, b) <= 2 * min(a, b)
    model[0].requires_grad_(False)
    assert count_parameters(model) == (a + 1) * b + b + 1


def test_a_clock_without_steps_says_so():
    assert math.isnan(StepClock().median_ms)
