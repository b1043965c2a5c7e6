"""KAN linear layers, forward and backward, beside the layers that people use: the peers' formulas in eager torch, as they lay them out."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.kan_family import RBF, Basis, BSpline, Chebyshev, Fourier, KANLinear, ReLUBump
from phyla.kan_family.functional.linear import _basis_linear_composite, basis_linear
from phyla.shared.bench import Case, Step, main


def training_step(layer: Callable[[Tensor], Tensor], rows: int, inputs: int, uniform: bool = False) -> Step:
    x = (torch.rand(rows, inputs) if uniform else torch.randn(rows, inputs) / 2).requires_grad_()

    def step() -> object:
        y = layer(x)
        y.backward(torch.ones_like(y))
        return y

    return step


class EfficientKAN(nn.Module):
    """Cox-de Boor over the whole (B, I, K) tensor, then two linear maps."""

    def __init__(self, inputs: int, outputs: int, grid_size: int = 5, order: int = 3) -> None:
        super().__init__()
        self.order = order
        self.register_buffer("knots", BSpline(grid_size, order).build(inputs).knots)
        self.base_weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.spline_weight = nn.Parameter(torch.randn(outputs, inputs, grid_size + order) / inputs**0.5)
        self.spline_scaler = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        t, u = self.knots, x.unsqueeze(-1)
        phi = ((u >= t[:, :-1]) & (u < t[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            phi = (u - t[:, : -(k + 1)]) / (t[:, k:-1] - t[:, : -(k + 1)]) * phi[..., :-1] + (t[:, k + 1 :] - u) / (
                t[:, k + 1 :] - t[:, 1:-k]
            ) * phi[..., 1:]
        weight = self.spline_weight * self.spline_scaler.unsqueeze(-1)
        return F.linear(F.silu(x), self.base_weight) + F.linear(phi.flatten(1), weight.flatten(1))


class FastKAN(nn.Module):
    """Layer norm, Gaussians at 8 centres, two linear maps."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.base = nn.LayerNorm(inputs), nn.Linear(inputs, outputs)
        self.register_buffer("centers", torch.linspace(-2, 2, 8))
        self.spline = nn.Linear(inputs * 8, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        phi = torch.exp(-(((self.norm(x).unsqueeze(-1) - self.centers) / (4 / 7)) ** 2))
        return self.spline(phi.flatten(1)) + self.base(F.silu(x))


class ChebyKAN(nn.Module):
    """cos(n acos(tanh x)) over the whole (B, I, K) tensor, then an einsum."""

    def __init__(self, inputs: int, outputs: int, degree: int = 4) -> None:
        super().__init__()
        self.coef = nn.Parameter(torch.randn(inputs, outputs, degree + 1) / inputs**0.5)
        self.register_buffer("degrees", torch.arange(degree + 1))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.tanh(x).unsqueeze(-1).expand(-1, -1, len(self.degrees)).acos()
        return torch.einsum("bid,iod->bo", (angle * self.degrees).cos(), self.coef)


class FourierKAN(nn.Module):
    """The naive layer: sums over an explicit (B, O, I, G) tensor."""

    def __init__(self, inputs: int, outputs: int, frequencies: int = 5) -> None:
        super().__init__()
        self.coef = nn.Parameter(torch.randn(2, outputs, inputs, frequencies) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(1, outputs))
        self.frequencies = frequencies

    def forward(self, x: Tensor) -> Tensor:
        m = torch.arange(1, self.frequencies + 1, device=x.device)
        angle = x[:, None, :, None] * m
        y = (angle.cos() * self.coef[0]).sum((-2, -1)) + (angle.sin() * self.coef[1]).sum((-2, -1))
        return y + self.bias


class ReLUKAN(nn.Module):
    """Squared products of ReLUs on repeated inputs, then a convolution of the size of the image of features."""

    def __init__(self, inputs: int, outputs: int, grid_size: int = 5, order: int = 3) -> None:
        super().__init__()
        basis = ReLUBump(grid_size, order).build(inputs)
        self.low, self.high = nn.Parameter(basis.low.detach()), nn.Parameter(basis.high.detach())
        self.r = 4 * grid_size**2 / (order + 1) ** 2
        self.conv = nn.Conv2d(1, outputs, (grid_size + order, inputs))

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.relu(x.unsqueeze(-1) - self.low), torch.relu(self.high - x.unsqueeze(-1))
        phi = (u * v * self.r) ** 2
        return self.conv(phi.reshape(len(x), 1, -1, x.shape[1])).flatten(1)


def ours(spec: Basis, rows: int = 1024, inputs: int = 784, outputs: int = 64, base: str | None = "silu", uniform: bool = False) -> Step:
    return training_step(KANLinear(inputs, outputs, basis=spec, base=base), rows, inputs, uniform)


def composite(spec: Basis, rows: int, inputs: int, outputs: int) -> Step:
    layer = KANLinear(inputs, outputs, basis=spec)
    o = layer.basis.operands()
    rest = (o["first"], o["second"], o["kind"], "silu", o["ints"], o["floats"])
    return training_step(lambda x: _basis_linear_composite(x, layer.coef, layer.base_weight, *rest), rows, inputs)


def peer(make: Callable[[int, int], nn.Module], rows: int = 1024, inputs: int = 784, outputs: int = 64, uniform: bool = False) -> Step:
    return training_step(make(inputs, outputs), rows, inputs, uniform)


def dense(rows: int, inputs: int, outputs: int, functions: int) -> Step:
    """The matrix products of a dense tile alone: what remains if the basis cost nothing."""
    phi, weight = torch.randn(rows, inputs * functions), torch.randn(outputs, inputs * functions)
    grad = torch.randn(rows, outputs)
    return lambda: (phi @ weight.t(), grad @ weight, grad.t() @ phi)


def dense_tiles(spec: BSpline, rows: int, inputs: int, outputs: int, window: int = 10) -> Step:
    """The same kernel on its dense tiles, which it takes where a spline has few functions: windows of the knots, summed."""
    knots = spec.build(inputs).knots
    starts = range(0, spec.num_basis, window)
    coefs = [nn.Parameter(torch.randn(outputs, inputs, min(window, spec.num_basis - k)) / inputs**0.5) for k in starts]
    base_weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def layer(x: Tensor) -> Tensor:
        parts = [
            basis_linear(
                x,
                coef,
                "bspline",
                first=knots[:, k : k + coef.shape[2] + spec.order + 1],
                ints=(spec.order, 0),
                base_weight=None if k else base_weight,
            )
            for k, coef in zip(starts, coefs, strict=True)
        ]
        return torch.stack(parts).sum(0)

    return training_step(layer, rows, inputs)


def flops(functions: int, rows: int = 1024, inputs: int = 784, outputs: int = 64) -> float:
    return 3 * 2.0 * rows * inputs * functions * outputs


BYTES = 4.0 * 3 * (1024 * 784 + 64 * 784 * 9)
CASES = [
    Case(
        "B-spline G5 k3, 1024 x 784 -> 64",
        {
            "phyla": partial(ours, BSpline()),
            "efficient-kan": partial(peer, EfficientKAN),
            "its GEMMs alone": partial(dense, 1024, 784, 64, 9),
        },
        flops=flops(9),
        bytes=BYTES,
        target=6.0,
    ),
    Case(
        "plain torch: B-spline G5 k3, 1024 x 784 -> 64",
        {"composite": partial(composite, BSpline(), 1024, 784, 64), "efficient-kan": partial(peer, EfficientKAN)},
        flops=flops(9),
        bytes=BYTES,
        target=2.0,
    ),
    Case(
        "B-spline G64 k3, 1024 x 256 -> 256",
        {
            "phyla": partial(ours, BSpline(64), 1024, 256, 256),
            "its dense tiles": partial(dense_tiles, BSpline(64), 1024, 256, 256),
            "their GEMMs alone": partial(dense, 1024, 256, 256, 68),
        },
        flops=flops(5, 1024, 256, 256),
        bytes=4.0 * 3 * (1024 * 256 + 256 * 256 * 68),
        target=3.0,
    ),
    Case(
        "RBF, 1024 x 784 -> 64",
        {"phyla": partial(ours, RBF()), "fast-kan": partial(peer, FastKAN)},
        flops=flops(9),
        bytes=BYTES,
        target=2.0,
    ),
    Case(
        "Chebyshev 4, 1024 x 784 -> 64",
        {"phyla": partial(ours, Chebyshev(), base=None), "ChebyKAN": partial(peer, ChebyKAN)},
        flops=flops(5),
        bytes=BYTES,
        target=2.0,
    ),
    Case(
        "Fourier 5, 1024 x 784 -> 64",
        {"phyla": partial(ours, Fourier(), base=None), "FourierKAN, naive": partial(peer, FourierKAN)},
        flops=flops(10),
        bytes=BYTES,
        target=20.0,
    ),
    Case(
        "ReLU bumps G5 k3, 1024 x 784 -> 64",
        {"phyla": partial(ours, ReLUBump(), base=None, uniform=True), "ReLU-KAN": partial(peer, ReLUKAN, uniform=True)},
        flops=flops(8),
        bytes=BYTES,
        target=4.0,
    ),
]

if __name__ == "__main__":
    main(CASES)
