"""Knots of B-spline layers: grids that follow the data, finer grids, and refits that leave the function as it is.

Legend: B samples, I inputs, G grid intervals, k order, K = G + k functions, n = G + 2 k + 1 knots.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from phyla.kan_family.functional.basis import Outside, bspline_basis

_TILE_ELEMENTS = 1 << 18


def extend(interior: Tensor, order: int) -> Tensor:
    """Add `order` knots on each side of an interior grid `(I, G + 1)`, with its mean spacing; returns `(I, n)`."""
    step = (interior[:, -1:] - interior[:, :1]) / (interior.shape[1] - 1)
    outer = torch.arange(1, order + 1, dtype=interior.dtype, device=interior.device) * step
    return torch.cat([interior[:, :1] - outer.flip(-1), interior, interior[:, -1:] + outer], 1)


def adapted(knots: Tensor, x: Tensor, order: int, eps: float, margin: float) -> Tensor:
    """Knots between the quantiles of the samples and equal spacing.

    Args:
        knots: `(I, n)`, the present knots; an input whose samples are all equal keeps them.
        x: samples `(B, I)`.
        order: spline order k.
        eps: 1 for equally spaced knots, 0 for quantiles.
        margin: how far the equally spaced grid reaches beyond the samples.

    Returns:
        `(I, n)`.

    Source: pykan, `KANLayer.update_grid_from_samples`.
    """
    intervals = knots.shape[1] - 2 * order - 1
    ordered = x.sort(0).values.t()
    places = [len(x) * i // intervals for i in range(intervals)] + [len(x) - 1]
    quantiles = ordered[:, places]
    low, high = ordered[:, :1] - margin, ordered[:, -1:] + margin
    uniform = low + (high - low) / intervals * torch.arange(intervals + 1, dtype=x.dtype, device=x.device)
    updated = extend(eps * uniform + (1 - eps) * quantiles, order)
    return torch.where(ordered[:, -1:] > ordered[:, :1], updated, knots)


def refined(knots: Tensor, order: int, grid_size: int) -> Tensor:
    """Knots `(I, n)` with the interior grid cut into `grid_size` intervals, by linear interpolation over the index of the knot."""
    interior = knots[:, order : knots.shape[1] - order]
    place = torch.linspace(0, interior.shape[1] - 1, grid_size + 1, dtype=knots.dtype, device=knots.device)
    below = place.floor().long().clamp(max=interior.shape[1] - 2)
    fine = torch.lerp(interior[:, below], interior[:, below + 1], place - below)
    return extend(fine, order)


def probes(knots: Tensor, order: int) -> Tensor:
    """`2 (k + 1)` points in every interior cell of `knots (I, n)`, as samples `(B, I)`: enough to determine a spline."""
    interior = knots[:, order : knots.shape[1] - order]
    count = 2 * (order + 1)
    inside = (torch.arange(count, dtype=knots.dtype, device=knots.device) + 0.5) / count
    points = interior[:, :-1, None] + (interior[:, 1:] - interior[:, :-1])[..., None] * inside
    return points.flatten(1).t()


def refit(x: Tensor, coef: Tensor, old: Tensor, new: Tensor, order: int, outside: Outside) -> Tensor:
    """Coefficients on new knots whose curves agree with the old ones on the samples, in the least-squares sense.

    Normal equations of each input, accumulated over tiles of samples, with a ridge of 1e-12 of the trace and iterative refinement: never
    fails on fewer samples than functions, repeated samples or unseen cells.

    Args:
        x: samples `(B, I)`, float64 as all others.
        coef: `(O, I, K)` on the old knots.
        old: `(I, n)`.
        new: `(I, n')`.
        order: spline order k.
        outside: how the curves continue; see `functional.bspline_basis`.

    Returns:
        `(O, I, K')`.
    """
    functions, targets = new.shape[1] - order - 1, coef.shape[2]
    gram = x.new_zeros(x.shape[1], functions, functions)
    cross = x.new_zeros(x.shape[1], functions, targets)
    for tile in _tiles(x, functions + targets):
        after = bspline_basis(tile, new, order, outside=outside).transpose(0, 1)
        before = bspline_basis(tile, old, order, outside=outside).transpose(0, 1)
        gram += after.mT @ after
        cross += after.mT @ before
    right = cross @ coef.permute(1, 2, 0)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    ridge = torch.where(trace > 0, 1e-12 * trace, 1.0)
    factor = torch.linalg.cholesky(gram + ridge[:, None, None] * torch.eye(functions, dtype=x.dtype, device=x.device))
    solution = torch.zeros_like(right)
    for _ in range(3):
        solution = solution + torch.cholesky_solve(right - gram @ solution, factor)
    return solution.permute(2, 0, 1)


def _tiles(x: Tensor, functions: int) -> Iterator[Tensor]:
    yield from torch.split(x, max(1, _TILE_ELEMENTS // max(1, x.shape[1] * functions)))
