"""KAN convolutions, forward and backward, beside the two layouts of public code: basis per pixel in eager torch, and unfold first."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.kan_family import BSpline, KANConv2d
from phyla.shared.bench import Case, Step, main

SAMPLES, CHANNELS, SIZE, OUTPUTS = 8, 16, 32, 32


def training_step(layer: nn.Module) -> Step:
    x = (torch.randn(SAMPLES, CHANNELS, SIZE, SIZE) / 2).requires_grad_()

    def step() -> object:
        y = layer(x)
        y.backward(torch.ones_like(y))
        return y

    return step


def recursion(x: Tensor, t: Tensor, order: int) -> Tensor:
    """Cox-de Boor with one knot row for everything, in eager torch."""
    u = x.unsqueeze(-1)
    phi = ((u >= t[:-1]) & (u < t[1:])).to(x.dtype)
    for k in range(1, order + 1):
        left = (u - t[: -(k + 1)]) / (t[k:-1] - t[: -(k + 1)]) * phi[..., :-1]
        phi = left + (t[k + 1 :] - u) / (t[k + 1 :] - t[1:-k]) * phi[..., 1:]
    return phi


class TorchConvKAN(nn.Module):
    """Basis of every pixel moved into the channels, a convolution each for base and basis, instance norm and PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(CHANNELS, OUTPUTS, 3, padding=1, bias=False)
        self.spline = nn.Conv2d(CHANNELS * 8, OUTPUTS, 3, padding=1, bias=False)
        self.norm, self.act = nn.InstanceNorm2d(OUTPUTS), nn.PReLU()
        self.register_buffer("knots", BSpline().build(1).knots[0])

    def forward(self, x: Tensor) -> Tensor:
        phi = recursion(x, self.knots, 3).moveaxis(-1, 2).flatten(1, 2)
        return self.act(self.norm(self.base(F.gelu(x)) + self.spline(phi)))


class UnfoldKAN(nn.Module):
    """Unfold, then an efficient-kan linear layer on every patch: the basis is evaluated nine times a pixel."""

    def __init__(self) -> None:
        super().__init__()
        inputs = CHANNELS * 9
        self.base_weight = nn.Parameter(torch.randn(OUTPUTS, inputs) / inputs**0.5)
        self.spline_weight = nn.Parameter(torch.randn(OUTPUTS, inputs, 8) / inputs**0.5)
        self.register_buffer("knots", BSpline().build(1).knots[0])

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, CHANNELS * 9)
        phi = recursion(patches, self.knots, 3)
        y = F.linear(F.silu(patches), self.base_weight) + F.linear(phi.flatten(1), self.spline_weight.flatten(1))
        return y.reshape(SAMPLES, SIZE * SIZE, OUTPUTS).transpose(1, 2).reshape(SAMPLES, OUTPUTS, SIZE, SIZE)


def ours() -> Step:
    return training_step(KANConv2d(CHANNELS, OUTPUTS, 3, padding=1))


def torch_conv_kan() -> Step:
    return training_step(TorchConvKAN())


def unfold() -> Step:
    return training_step(UnfoldKAN())


def convolution() -> Step:
    """The convolution of the expanded channels alone: what remains if the basis cost nothing."""
    layer = nn.Conv2d(CHANNELS * 9, OUTPUTS, 3, padding=1, bias=False)
    x = torch.randn(SAMPLES, CHANNELS * 9, SIZE, SIZE, requires_grad=True)

    def step() -> object:
        y = layer(x)
        y.backward(torch.ones_like(y))
        return y

    return step


FLOPS = 3 * 2.0 * SAMPLES * SIZE**2 * OUTPUTS * CHANNELS * 9 * 9
BYTES = 4.0 * 3 * SAMPLES * SIZE**2 * (CHANNELS + OUTPUTS)
NAME = "B-spline G5 k3, 8 x 16 x 32 x 32 -> 32, 3 x 3"
CASES = [
    Case(NAME, {"phyla": ours, "torch-conv-kan": torch_conv_kan, "convolution alone": convolution}, flops=FLOPS, bytes=BYTES, target=3.0),
    Case(f"{NAME}, unfold", {"phyla": ours, "unfold first": unfold}, flops=FLOPS, bytes=BYTES, target=10.0),
]

if __name__ == "__main__":
    main(CASES)
