"""Fit a function of two variables: L-BFGS, grids brought to where the data are, then finer grids without losing what was learned."""

import torch

from phyla.kan_family import KAN, BSpline, fit

torch.manual_seed(0)
x = 2 * torch.rand(1000, 2, dtype=torch.float64) - 1
y = torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:].square())

model = KAN([2, 5, 1], basis=BSpline(grid_size=3), dtype=torch.float64)
for grid_size in (3, 6, 12):
    model.update_grid(x[:800])  # refining keeps the function inside the grids only
    model.refine(grid_size)
    result = fit(model, x[:800], y[:800], steps=8, grid_update_until=0, x_test=x[800:], y_test=y[800:])
    assert result.test_loss is not None
    print(f"G = {grid_size:2d}: training RMSE {result.train_loss[-1].sqrt():.1e}, test RMSE {result.test_loss[-1].sqrt():.1e}")
