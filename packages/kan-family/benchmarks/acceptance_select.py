"""S-KAN: does a pool of bases fit functions of very different kinds, each as well as its best basis and better than an MLP?

Seven functions on `[-1, 1]^n`, 512 training points, `SelectKAN([n, 6, 1])` with a pool of five bases, 600 Adam steps: 50 % full (1e-2),
30 % select, 20 % pruned (5e-3). Its peers get the same steps and rates: `KAN([n, 6, 1])` with each basis of the pool alone, and a SiLU
MLP with two hidden layers and as many parameters as the S-KAN that starts the training.
Bounds for the relative test RMSE: at most 0.6 of the MLP's (1.5 on |x + y|, a kink), at most 3 times that of the best single basis.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from phyla.kan_family.bases import RBF, BSpline, Chebyshev, Fourier, Wavelet
from phyla.kan_family.model import KAN
from phyla.kan_family.select import SelectKAN

POOL = (BSpline(8, 3), RBF(8, (-1.0, 1.0)), Chebyshev(5), Fourier(4), Wavelet(6))
STEPS = (300, 180, 120)
pi = math.pi

FUNCTIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "sin 5 pi x": (1, lambda x: torch.sin(5 * pi * x)),
    "exp(sin(pi x) + y^2)": (2, lambda x, y: torch.exp(torch.sin(pi * x) + y**2)),
    "x y": (2, lambda x, y: x * y),
    "J0(20 x)": (1, lambda x: torch.special.bessel_j0(20 * x)),
    "tanh(20 (x - 0.2))": (1, lambda x: torch.tanh(20 * (x - 0.2))),
    "|x + y|": (2, lambda x, y: (x + y).abs()),
    "exp((sin(pi(a^2 + b^2)) + sin(pi(c^2 + d^2))) / 2)": (
        4,
        lambda a, b, c, d: torch.exp((torch.sin(pi * (a**2 + b**2)) + torch.sin(pi * (c**2 + d**2))) / 2),
    ),
}


def mlp(inputs: int, parameters: int) -> nn.Module:
    """The widest two-hidden-layer MLP that has at most this many parameters."""
    width = 1
    while (inputs + 1) * (width + 1) + (width + 2) * (width + 1) + width + 2 <= parameters:
        width += 1
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for phase, steps in enumerate(STEPS):
        if isinstance(model, SelectKAN):
            (lambda: model.set_stage("full"), lambda: model.set_stage("select"), model.prune_bases)[phase]()
        if phase != 1:
            optimizer = torch.optim.Adam(model.parameters(), lr=(1e-2, 1e-2, 5e-3)[phase])
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()


def error(model: nn.Module, dims: int, function: Callable[..., Tensor], seed: int) -> float:
    """Relative test RMSE after training."""
    generator = torch.Generator().manual_seed(seed)
    x, x_test = (2 * torch.rand(count, dims, generator=generator) - 1 for count in (512, 2000))
    y, y_test = (function(*points.T)[:, None] for points in (x, x_test))
    train(model, x, y)
    with torch.no_grad():
        return float((model(x_test) - y_test).norm() / y_test.norm())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    print("function                                             S-KAN    MLP      best single         S-KAN/MLP  S-KAN/single")
    failed = []
    for name, (dims, function) in FUNCTIONS.items():
        torch.manual_seed(seed)
        pool = SelectKAN([dims, 6, 1], bases=POOL)
        parameters = sum(p.numel() for p in pool.parameters())
        ours = error(pool, dims, function, seed)
        plain = error(mlp(dims, parameters), dims, function, seed)
        single = {type(basis).__name__: error(KAN([dims, 6, 1], basis=basis), dims, function, seed) for basis in POOL}
        best = min(single, key=single.__getitem__)
        ratios = ours / plain, ours / single[best]
        print(f"{name:<52} {ours:<8.1e} {plain:<8.1e} {single[best]:<8.1e} {best:<10} {ratios[0]:<10.3f} {ratios[1]:.2f}", flush=True)
        if ratios[0] > (1.5 if name == "|x + y|" else 0.6) or ratios[1] > 3:
            failed.append(name)
    assert not failed, failed


if __name__ == "__main__":
    main()
