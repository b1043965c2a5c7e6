"""Published numbers, the way of the learning rate, and two stages on a task that can be learned."""

import copy
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from phyla.quantized import (
    BIPER_CIFAR10,
    BIPER_IMAGENET,
    BinaryLinear,
    BiPer,
    EDESign,
    ReCU,
    Stage,
    TwoStage,
    biper_penalty,
    pack,
)


def test_published_numbers() -> None:
    first, second = BIPER_CIFAR10
    assert (first.epochs, first.lr, first.weight_decay, first.penalty, first.batch_size) == (600, 0.021, 0.0016, 0.037, 256)
    assert (second.epochs, second.lr, second.weight_decay, second.penalty) == (300, 0.0037, 0.00016, 0.0468)
    assert [(s.epochs, s.lr, s.weight_decay, s.penalty, s.batch_size) for s in BIPER_IMAGENET] == [
        (200, 0.1, 1e-4, 0.0, 512),
        (100, 0.01, 1e-4, 0.0, 512),
    ]


def test_the_learning_rate_rises_for_five_epochs_then_follows_a_cosine_to_zero() -> None:
    stage = BIPER_CIFAR10[0]
    assert [stage.rate(epoch) for epoch in range(5)] == pytest.approx([0.021 * (epoch + 1) / 5 for epoch in range(5)])
    assert stage.rate(4) == 0.021
    assert stage.rate(4 + 298) == pytest.approx(0.0105), "half way of 596 epochs"
    assert 0 < stage.rate(599) < 1e-6
    assert stage.rate(600) == pytest.approx(0, abs=1e-15)
    plain = Stage(10, 1.0, 0.0, warmup=0)
    assert [plain.rate(epoch) for epoch in range(11)] == pytest.approx([(1 + math.cos(math.pi * e / 10)) / 2 for e in range(11)])
    assert [Stage(3, 1.0, 0.0).rate(epoch) for epoch in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8]), "no cosine in so few epochs"


def test_the_schedule_sets_the_rate() -> None:
    model, stage = nn.Linear(2, 2), Stage(8, 0.5, 0.01, momentum=0.7)
    optimizer = stage.optimizer(model)
    schedule = stage.schedule(optimizer)
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([stage.rate(epoch) for epoch in range(8)])
    assert optimizer.param_groups[0]["momentum"] == 0.7
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def task(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Signs of a sum of signs: what one binary layer can say."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 15, generator=generator)
    return x, (x.sign().sum(1) > 0).long()


def network(frequency: float = 20.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        BinaryLinear(15, 32, weight_binarizer=BiPer(frequency), normalize_input=True), nn.BatchNorm1d(32), nn.Hardtanh(), nn.Linear(32, 2)
    )


def batches() -> Iterable[tuple[Tensor, Tensor]]:
    x, y = task()
    return zip(x.split(64), y.split(64), strict=True)


def accuracy(model: nn.Module) -> float:
    x, y = task(1)
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).double().mean())


def test_two_stages_learn_and_end_with_signs() -> None:
    model = network()
    seen: list[tuple[int, int, float]] = []
    stages = (Stage(12, 0.05, 1e-4, 0.037, warmup=2), Stage(6, 0.01, 1e-5, 0.0468, warmup=0))
    best = TwoStage(model, stages).run(batches, validate=accuracy, callback=lambda *epoch: seen.append(epoch))
    assert [(number, epoch) for number, epoch, _ in seen] == [(1, e) for e in range(12)] + [(2, e) for e in range(6)]
    assert seen[-1][2] < seen[0][2] / 2
    assert model[0].weight_binarizer.stage == 2
    assert accuracy(model) == best[1] > 0.9, "the model ends with the best weights"
    x, _ = task(2)
    with torch.no_grad():
        assert torch.equal(pack(model)(x), model.eval()(x))


def test_the_first_epoch_by_hand() -> None:
    model, twin = network(), network()
    stage = Stage(1, 0.1, 0.01, 0.5, warmup=0)
    TwoStage(model, (stage,)).run(batches)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for x, y in batches():
        optimizer.zero_grad()
        (nn.functional.cross_entropy(twin(x), y) + biper_penalty(twin, weight=0.5)).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_second_stage_starts_from_the_best_of_the_first() -> None:
    model = network()
    states, scores = [], iter([0.1, 0.9, 0.2, 0.0])

    def validate(module: nn.Module) -> float:
        assert not module.training
        states.append(copy.deepcopy(module.state_dict()))
        return next(scores)

    frozen = Stage(1, 1e-30, 0.0, warmup=0, momentum=0.0)
    best = TwoStage(model, (Stage(3, 0.1, 0.0, warmup=0), frozen)).run(batches, validate=validate)
    assert best == (0.9, 0.0)
    assert torch.equal(states[3]["0.weight"], states[1]["0.weight"])
    assert not torch.equal(states[2]["0.weight"], states[1]["0.weight"])


def test_scheduled_binarizers_follow_and_one_stage_will_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BinaryLinear(15, 8, weight_binarizer=ReCU(), input_binarizer=EDESign()), nn.Linear(8, 2))
    taus: list[float] = []
    best = TwoStage(model, (Stage(4, 0.01, 0.0),)).run(batches, callback=lambda *_: taus.append(model[0].weight_binarizer.tau))
    assert len(best) == 1
    assert math.isnan(best[0])
    assert taus[0] == 0.85
    assert taus == sorted(set(taus))
    assert taus[-1] < 0.99
    assert model[0].input_binarizer.t == pytest.approx(10 ** (-1 + 2 * 0.75))


def test_messages() -> None:
    with pytest.raises(ValueError, match="stages: expected one or two, got 0"):
        TwoStage(network(), ())
    with pytest.raises(ValueError, match="batches: expected at least one batch an epoch, got none"):
        TwoStage(network(), (Stage(1, 0.1, 0.0),)).run(list)
    with pytest.raises(ValueError, match="epochs: expected a positive int, got 0"):
        TwoStage(network(), (Stage(0, 0.1, 0.0),)).run(batches)
