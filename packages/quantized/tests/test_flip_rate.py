"""The fraction of signs that flip, counted on packed bits."""

import pytest
import torch
from torch import nn

from phyla.quantized import BinaryConv2d, BinaryLinear, BiPer, ReCU, flip_rate


def test_rates_are_the_counted_flips() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        BinaryConv2d(3, 5, 3, weight_binarizer=ReCU()), nn.Flatten(), nn.Linear(5, 7), BinaryLinear(7, 3, weight_binarizer=BiPer(20.0))
    )
    layers = [model[0], model[3]]
    expected = []
    with flip_rate(model) as flips:
        before = [(layer.weight_binarizer(layer.weight) < 0) for layer in layers]
        for _ in range(4):
            with torch.no_grad():
                for layer in layers:
                    layer.weight.add_(0.3 * torch.randn_like(layer.weight))
            flips.step()
            after = [(layer.weight_binarizer(layer.weight) < 0) for layer in layers]
            expected.append([float((a != b).double().mean()) for a, b in zip(before, after, strict=True)])
            before = after
    result = flips.rates
    assert result.layers == ("0", "3")
    assert torch.equal(result.rates, torch.tensor(expected, dtype=torch.float64))
    assert result.rates.min() > 0
    assert result.mean() == {"0": float(result.rates[:, 0].mean()), "3": float(result.rates[:, 1].mean())}


def test_follows_an_optimizer_while_it_is_open() -> None:
    model = BinaryLinear(70, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with flip_rate(model, optimizer) as flips:
        for scale in (-1.0, 1.0, -1.0):
            with torch.no_grad():
                model.weight.mul_(scale)
            optimizer.step()
    with torch.no_grad():
        model.weight.neg_()
    optimizer.step()
    assert flips.rates.rates.flatten().tolist() == [1.0, 0.0, 1.0]


def test_needs_a_binary_layer() -> None:
    with pytest.raises(ValueError, match="binary"), flip_rate(nn.Linear(3, 3)):
        pass
