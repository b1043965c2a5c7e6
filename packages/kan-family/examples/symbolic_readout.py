"""Read a trained network as a formula."""

import torch

from phyla.kan_family import KAN, BSpline, fit, symbolic_readout

torch.manual_seed(0)
x = 2 * torch.rand(500, 2, dtype=torch.float64) - 1
y = torch.sin(3 * x[:, :1]) + x[:, 1:].square()

model = KAN([2, 1], basis=BSpline(grid_size=10), dtype=torch.float64)
fit(model, x, y, steps=10)

readout = symbolic_readout(model, x)
print(f"y = {readout.formulas[0]}    (r2 {readout.r2[0]:.6f})")
