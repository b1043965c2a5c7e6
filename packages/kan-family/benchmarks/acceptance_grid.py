"""Grid extension: does a KAN keep gaining accuracy as its grids are refined, where an MLP of its size stays behind?

`f(x, y) = exp(sin(pi x) + y^2)` on `[-1, 1]^2`, 1000 points, float64; `KAN([2, 5, 1])`, L-BFGS with 12 steps at each of G = 3, 5, 10, 20
(grid updates before steps 0 and 4 of the first phase) against a SiLU MLP 2-16-16-1 (337 parameters) with 48 steps.
Bounds: for every seed the training RMSE at G = 20 is at most 2e-3, at most 0.1 of that at G = 3 and below that of every stage before;
the mean of the MLPs stays above 3e-3.
"""

import torch
from torch import Tensor, nn

from phyla.kan_family.bases import BSpline
from phyla.kan_family.fitting import fit
from phyla.kan_family.model import KAN

GRIDS = (3, 5, 10, 20)
STEPS = 12


def data(seed: int) -> tuple[Tensor, Tensor]:
    x = 2 * torch.rand(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1
    return x, torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:].square())


def kan_errors(seed: int) -> list[float]:
    x, y = data(seed)
    torch.manual_seed(seed)
    model = KAN([2, 5, 1], basis=BSpline(GRIDS[0], 3), dtype=torch.float64)
    errors = []
    for grid_size in GRIDS:
        model.refine(grid_size)
        until = 5 if grid_size == GRIDS[0] else 0
        result = fit(model, x, y, steps=STEPS, grid_update_every=4, grid_update_until=until)
        errors.append(float(result.train_loss[-1].sqrt()))
    return errors


def mlp_error(seed: int) -> float:
    x, y = data(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1)).double()
    return float(fit(model, x, y, steps=STEPS * len(GRIDS)).train_loss[-1].sqrt())


def main() -> None:
    print("seed  " + "".join(f"KAN G={grid_size:<8}" for grid_size in GRIDS) + "MLP")
    mlp = []
    for seed in (0, 1, 2):
        errors = kan_errors(seed)
        mlp.append(mlp_error(seed))
        print(f"{seed:<6}" + "".join(f"{error:<14.2e}" for error in errors) + f"{mlp[-1]:.2e}")
        assert errors[-1] <= min(2e-3, 0.1 * errors[0])
        assert errors[-1] < min(errors[:-1])
    assert sum(mlp) / len(mlp) > 3e-3


if __name__ == "__main__":
    main()
