"""S-KAN: does a pool of bases fit functions of very different kinds, each as well as its best basis and better than an MLP?

Seven functions on `[-1, 1]^n`, 512 training points, `SelectKAN([n, 6, 1])` with a pool of five bases, 600 Adam steps: 50 % full and 30 %
select at rate 1e-2 (the logits at a tenth of it in select, so that late changes of mind are rare), 20 % pruned at 5e-3, and a short fine-
tune of 60 steps at 1e-3. Its peers get the same steps and rates: `KAN([n, 6, 1])` with each basis of the pool alone, and a SiLU MLP with
two hidden layers and as many parameters as the trained S-KAN. Bounds for the relative test RMSE, a mean over three seeds: at most 0.6 of
the MLP's (1.5 on |x + y|, a kink, where an MLP is at home), at most 3 times that of the best single basis.
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
    for stage, rate, steps in (("full", 1e-2, 300), ("select", 1e-2, 180), ("pruned", 5e-3, 120), ("fine-tune", 1e-3, 60)):
        if isinstance(model, SelectKAN):
            if stage == "pruned":
                model.prune_bases()
            elif stage != "fine-tune":
                model.set_stage("full" if stage == "full" else "select")
        if stage in ("full", "pruned"):  # pruning replaces the parameters
            logits = [p for name, p in model.named_parameters() if name.endswith("select_logits")]
            others = [p for name, p in model.named_parameters() if not name.endswith("select_logits")]
            optimizer = torch.optim.Adam([{"params": others}, {"params": logits}])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.param_groups[1]["lr"] = rate / 10 if stage == "select" else rate
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


def errors(dims: int, function: Callable[..., Tensor], seed: int) -> list[float]:
    """Of S-KAN, the MLP, and each single basis."""
    torch.manual_seed(seed)
    ours = SelectKAN([dims, 6, 1], bases=POOL)
    found = [error(ours, dims, function, seed)]
    found.append(error(mlp(dims, sum(p.numel() for p in ours.parameters())), dims, function, seed))
    return found + [error(KAN([dims, 6, 1], basis=basis), dims, function, seed) for basis in POOL]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print(f"{'function':<52} S-KAN    MLP      best single basis   S-KAN/MLP  S-KAN/single")
    failed = []
    for name, (dims, function) in FUNCTIONS.items():
        ours, plain, *single = torch.tensor([errors(dims, function, seed) for seed in seeds]).mean(0).tolist()
        best = min(single)
        basis = type(POOL[single.index(best)]).__name__
        print(f"{name:<52} {ours:<8.1e} {plain:<8.1e} {best:<8.1e} {basis:<10} {ours / plain:<10.3f} {ours / best:.2f}", flush=True)
        if ours / plain > (1.5 if name == "|x + y|" else 0.6) or ours / best > 3:
            failed.append(name)
    assert not failed, failed


if __name__ == "__main__":
    main()
