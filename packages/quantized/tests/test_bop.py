"""Bop against its formula, its exact resumption, and a problem that it solves."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from phyla.quantized import BinaryLinear, Bop, SignSTE


def test_steps_are_the_published_rule() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(7, 5))
    optimizer = Bop([weight], 0.3, threshold=0.1)
    assert torch.equal(weight.abs(), torch.ones(7, 5)), "stored as signs"
    w, m = weight.detach().clone(), torch.zeros(7, 5)
    for _ in range(20):
        weight.grad = torch.randn(7, 5)
        m = (1 - 0.3) * m + 0.3 * weight.grad
        w = torch.where((m.abs() > 0.1) & (m.sign() == w.sign()), -w, w)
        optimizer.step()
        assert torch.equal(weight, w)


def test_groups_schedulers_and_missing_gradients() -> None:
    a, b, still = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = Bop([{"params": [a]}, {"params": [b], "lr": 0.5, "threshold": 10.0}, {"params": [still]}], 0.1, threshold=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    scheduler.step()
    assert torch.equal(a, -torch.ones(3))
    assert torch.equal(b, torch.ones(3)), "below its threshold"
    assert torch.equal(still, torch.ones(3))
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.25, 0.05]


def train(model: nn.Module, optimizer: Bop, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(32, 16, generator=generator)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (model(x) - x[:, :4] * 3).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def test_resumes_exactly() -> None:
    torch.manual_seed(0)
    model = BinaryLinear(16, 4, scale="none", weight_binarizer=SignSTE(None))
    optimizer = Bop([model.weight], 0.2, threshold=0.01)
    train(model, optimizer, 5, 1)
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    twin = copy.deepcopy(model)
    nn.init.ones_(twin.weight)
    other = Bop([twin.weight], 0.9)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(model, optimizer, 10, 2)
    train(twin, other, 10, 2)
    assert torch.equal(model.weight, twin.weight)
    assert all(torch.equal(a["mean"], b["mean"]) for a, b in zip(optimizer.state.values(), other.state.values(), strict=True))


def test_finds_the_binary_teacher() -> None:
    torch.manual_seed(0)
    student = BinaryLinear(24, 6, scale="none", weight_binarizer=SignSTE(None), input_binarizer=nn.Identity())
    teacher = torch.where(torch.rand(6, 24) < 0.5, -1.0, 1.0)
    optimizer = Bop([student.weight], 0.1, threshold=0.02)
    for _ in range(300):
        x = torch.randn(64, 24)
        optimizer.zero_grad()
        (student(x) - x @ teacher.T).square().mean().backward()
        optimizer.step()
    assert torch.equal(student.weight, teacher)


def test_bad_arguments() -> None:
    weight = nn.Parameter(torch.ones(3))
    for options in ({"lr": 0.0}, {"lr": 1.5}, {"threshold": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Bop([weight], **options)
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = Bop(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
