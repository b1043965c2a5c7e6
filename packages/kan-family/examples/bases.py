"""One basis object in a linear layer, a convolution and a network; knots that follow the data, and a finer grid without a change."""

import torch

from phyla.kan_family import KAN, BSpline, Fourier, KANConv2d, KANLinear

torch.manual_seed(0)

for basis in (BSpline(grid_size=8, order=3), Fourier(num_frequencies=4)):
    layer = KANLinear(16, 8, basis=basis)
    image = KANConv2d(3, 8, kernel_size=3, padding=1, basis=basis)
    print(basis, tuple(layer(torch.randn(32, 16)).shape), tuple(image(torch.randn(2, 3, 16, 16)).shape))

model, x = KAN([2, 5, 1], dtype=torch.float64), 3 * torch.randn(1000, 2, dtype=torch.float64)
print("inside the grid before the update:", model.layers[0].coverage(x).tolist())
model.update_grid(x)
print("and after:", model.layers[0].coverage(x).tolist())
before = model(x)
model.refine(10)
print(f"largest change by twice as many intervals: {float((model(x) - before).detach().abs().max()):.1e}")
