"""Let every node choose its basis: train the whole pool, train the choice, keep the chosen branches alone."""

import torch

from phyla.kan_family import RBF, BSpline, Chebyshev, Fourier, SelectKAN

torch.manual_seed(0)
pool = (BSpline(8), RBF(8, (-1.0, 1.0)), Chebyshev(5), Fourier(4))
x = 2 * torch.rand(512, 1) - 1
y = torch.sin(5 * torch.pi * x)

model = SelectKAN([1, 4, 1], bases=pool)
for stage, steps, rate in (("full", 100, 1e-2), ("select", 60, 1e-2), ("pruned", 40, 5e-3)):
    if stage == "pruned":
        model.prune_bases()
    else:
        model.set_stage(stage)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)  # new parameters after pruning
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    print(f"{stage:<7} {sum(p.numel() for p in model.parameters()):4d} parameters, RMSE {loss.sqrt():.1e}")
for layer in model.layers:
    print("chosen:", ", ".join(type(pool[index]).__name__ for index in layer.selection.tolist()))
