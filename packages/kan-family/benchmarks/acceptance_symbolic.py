"""Symbolic readout: curves with known formulas, and `exp(sin(pi x) + y^2)` from trained KANs.

Bounds: on the two curves `1 - r2 < 1e-9`, `|a|` within 1e-4, `|c|` within 1e-3; every `KAN([2, 1, 1])` that reaches a training RMSE below
1e-3 reads as `exp` of `sin` and `x^2` with r2 above 0.999, and at least one does (a network this narrow has local minima, so that seeds
differ).
"""

from time import perf_counter

import torch

from phyla.kan_family.bases import BSpline
from phyla.kan_family.fitting import fit
from phyla.kan_family.model import KAN
from phyla.kan_family.symbolic import fit_edge, symbolic_readout

SEEDS = range(4)
GRIDS = (5, 10, 20, 40)
TRAINED = 1e-3  # RMSE


def curves() -> None:
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)
    targets = {
        "sin": (5 * torch.sin(3 * x + 2) + 0.7, 3.0, 5.0),
        "tanh": (-1.7 * torch.tanh(2.2 * x - 0.4) + 0.3, 2.2, 1.7),
    }
    for name, (y, a, c) in targets.items():
        start = perf_counter()
        fits = fit_edge(x, y)
        seconds = perf_counter() - start
        best = fits[0]
        print(f"{best}  {seconds * 1e3:.0f} ms for {len(fits)} functions")
        assert best.name == name
        assert 1 - best.r2 < 1e-9
        assert abs(abs(best.a) - a) < 1e-4
        assert abs(abs(best.c) - c) < 1e-3


def train(seed: int) -> tuple[KAN, torch.Tensor, float]:
    torch.manual_seed(seed)
    x = 2 * torch.rand(1000, 2, dtype=torch.float64) - 1
    y = torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:].square())
    model = KAN([2, 1, 1], basis=BSpline(GRIDS[0], 3), dtype=torch.float64)
    for grid_size in GRIDS:
        model.refine(grid_size)
        error = float(fit(model, x, y, steps=20, grid_update_until=0).train_loss[-1].sqrt())
        if error < TRAINED:
            break
    return model, x, error


def main() -> None:
    curves()
    trained = 0
    for seed in SEEDS:
        model, x, error = train(seed)
        readout = symbolic_readout(model, x)
        names = [[fit.name if fit else "?" for row in layer for fit in row] for layer in readout.fits]
        r2 = float(readout.r2[0])
        print(f"seed {seed}: RMSE {error:.1e}, read as {names} with r2 {r2:.6f}: {readout.formulas[0]}")
        if error < TRAINED:
            trained += 1
            assert names == [["sin", "x^2"], ["exp"]]
            assert r2 > 0.999
    assert trained > 0, f"no seed reached an RMSE of {TRAINED}"


if __name__ == "__main__":
    main()
