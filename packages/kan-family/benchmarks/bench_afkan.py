"""One training step of an AF-KAN layer, forward and backward, beside the authors' formula with all features in memory."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from phyla.kan_family.afkan import AFKANLinear, Reduction
from phyla.shared.bench import Case, Step, main

ROWS, INPUTS, OUTPUTS, PAIRS = 64, 784, 64, 6


def features(layer: AFKANLinear, x: Tensor) -> Tensor:
    """`(B, I, M)`: silu, quad1, normalised twice as in the authors' code, though the min-max cancels the L2 factor."""
    low, high = layer.basis.tensors()
    f: Tensor = (F.silu(x.unsqueeze(-1) - low) * F.silu(high - x.unsqueeze(-1))) ** 2
    f = f / torch.linalg.vector_norm(f)
    return (f - f.min()) / (f.max() - f.min())


def output(layer: AFKANLinear, z: Tensor) -> Tensor:
    assert layer.norm is not None
    return F.linear(F.silu(layer.norm(z)), layer.weight)


def authors_global(layer: AFKANLinear, x: Tensor) -> Tensor:
    assert layer.temperature is not None
    f = features(layer, x)
    attention = torch.softmax(layer.score(f) / layer.temperature.clamp(min=1), 1)
    return output(layer, (f * attention).sum(-1))


def authors_multistep(layer: AFKANLinear, x: Tensor) -> Tensor:
    return output(layer, layer.score(features(layer, x)).squeeze(-1))


def authors_spatial(layer: AFKANLinear, x: Tensor) -> Tensor:
    assert layer.temperature is not None
    f = features(layer, x).transpose(1, 2)
    attention = torch.softmax(layer.score(f) / layer.temperature.clamp(min=1), 1)
    return output(layer, (f * attention).sum(1))


def step(reduction: Reduction, forward: Callable[[AFKANLinear, Tensor], Tensor] | None) -> Step:
    torch.manual_seed(0)
    layer = AFKANLinear(INPUTS, OUTPUTS, reduction=reduction)
    x = torch.randn(ROWS, INPUTS, requires_grad=True)
    grad = torch.randn(ROWS, OUTPUTS)
    return lambda: (layer(x) if forward is None else forward(layer, x)).backward(grad)


def case(reduction: Reduction, authors: Callable[[AFKANLinear, Tensor], Tensor]) -> Case:
    inputs, weights = ROWS * INPUTS, INPUTS * OUTPUTS
    return Case(
        f"AF-KAN {reduction}, {ROWS} x {INPUTS} -> {OUTPUTS}, forward and backward",
        {"phyla": functools.partial(step, reduction, None), "authors": functools.partial(step, reduction, authors)},
        flops=6 * ROWS * weights + 75 * PAIRS * inputs,
        bytes=4 * (3 * inputs + 3 * weights + 2 * ROWS * OUTPUTS),
        target=4.0,
    )


CASES = [case("global", authors_global), case("multistep", authors_multistep), case("spatial", authors_spatial)]

if __name__ == "__main__":
    main(CASES)
