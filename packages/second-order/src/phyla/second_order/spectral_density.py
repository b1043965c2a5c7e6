"""The spectral density by stochastic Lanczos quadrature, with error bars."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phyla.second_order.functional.quadrature import gaussian_density, tridiagonal_quadrature
from phyla.second_order.lanczos import block_lanczos, checked_steps
from phyla.second_order.operator import CurvatureOperator
from phyla.second_order.probes import given, mean_and_error, rademacher
from phyla.shared import checks

__all__ = ["SpectralDensity", "spectral_density"]

_BASIS_BYTES = 1 << 28  # of the bases of the probes that run side by side


@dataclass(frozen=True)
class SpectralDensity:
    """A smoothed density of eigenvalues, and the quadrature rules behind it.

    Attributes:
        grid: (n,).
        density: (n,), integrates to one.
        stderr: (n,), standard error of the density over the probes; infinite for one probe.
        nodes: (R, m), Ritz values of each probe; a run that ended early repeats its last node with weight 0.
        weights: (R, m), each row sums to one.
        bandwidth: standard deviation of the Gaussian on each node.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    nodes: Tensor
    weights: Tensor
    bandwidth: float

    def moment(self, order: int) -> tuple[float, float]:
        """`tr(A^order) / P` and its standard error, from the nodes.

        Raises: TypeError, ValueError if `order` is no positive int.
        """
        checks.positive_int("order", order)
        return mean_and_error((self.weights * self.nodes**order).sum(1))

    def mass(self, low: float, high: float) -> tuple[float, float]:
        """The fraction of eigenvalues in [low, high] and its standard error, from the nodes.

        Raises: ValueError if `low` is above `high`.
        """
        if not low <= high:
            raise ValueError(f"low: expected at most high={high}, got {low}")
        inside = (self.nodes >= low) & (self.nodes <= high)
        return mean_and_error((self.weights * inside).sum(1))

    def plot(self, ax: Any = None, *, log: bool = True) -> Any:
        """Draw the density with a band of two standard errors; needs matplotlib (extra `plot`). Returns: the axes."""
        import matplotlib.pyplot as plt

        axes = plt.subplots()[1] if ax is None else ax
        grid, density = self.grid.cpu().numpy(), self.density.cpu().numpy()
        axes.plot(grid, density)
        if self.nodes.shape[0] > 1:
            band = 2 * self.stderr.cpu().numpy()
            axes.fill_between(grid, (density - band).clip(min=0), density + band, alpha=0.3)
        if log:
            axes.set_yscale("log")
            axes.set_ylim(bottom=1e-6 * float(density.max()))
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("density")
        return axes


def spectral_density(
    operator: CurvatureOperator,
    *,
    num_steps: int = 64,
    num_probes: int = 8,
    num_points: int = 1024,
    bandwidth: float | None = None,
    margin: float = 0.05,
    grid: Tensor | None = None,
    probes: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Stochastic Lanczos quadrature: the Gauss rules of `num_probes` random start vectors, averaged and smoothed.

    Probes run side by side, one product of the operator with a block a step, as far as their bases fit in 256 MiB.

    Args:
        operator: symmetric, (P, P).
        num_steps: Lanczos steps a probe, at most P.
        num_probes: random sign vectors.
        num_points: points of the default grid.
        bandwidth: standard deviation of the smoothing; default the range of the nodes over `num_steps`.
        margin: the default grid goes beyond the nodes by this fraction of their range.
        grid: (n,), instead of the default one.
        probes: rows are start vectors, (R, P), instead of random ones.
        generator: of the probes.

    Raises: TypeError, ValueError for wrong sizes and ranges, and for a probe of zero length.
    Source: Ubaru, Chen, Saad 2017, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature"; Ghorbani et al. 2019.
    """
    steps = checked_steps(num_steps, operator)
    checks.positive_int("num_points", num_points)
    checks.in_range("margin", margin, 0.0)
    count = checks.positive_int("num_probes", num_probes)
    starts = rademacher(count, operator, generator) if probes is None else given(probes, operator)
    if not bool(starts.any(1).all()):
        raise ValueError("probes: expected rows that are not zero, got a row of zeros")
    side_by_side = max(1, _BASIS_BYTES // (steps * operator.shape[0] * operator.dtype.itemsize))
    with torch.no_grad():
        rules = [_rules(operator, block, steps) for block in torch.split(starts, side_by_side)]
    nodes, weights = (torch.cat(parts) for parts in zip(*rules, strict=True))
    low, high = float(nodes.min()), float(nodes.max())
    if bandwidth is None:
        bandwidth = (high - low or abs(high) or 1.0) / steps
    if grid is None:
        edge = margin * (high - low) or 3 * bandwidth
        grid = torch.linspace(low - edge, high + edge, num_points, dtype=torch.float64, device=nodes.device)
    else:
        grid = checks.shape("grid", checks.floating("grid", grid), (None,)).to(nodes.device, torch.float64)
    curves = gaussian_density(nodes, weights, grid, bandwidth)
    runs = curves.shape[0]
    stderr = curves.std(0) / math.sqrt(runs) if runs > 1 else torch.full_like(grid, math.inf)
    return SpectralDensity(grid, curves.mean(0), stderr, nodes, weights, bandwidth)


def _rules(operator: CurvatureOperator, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of each start vector, (R, m); short runs repeat the last node with weight 0."""
    alphas, betas, _, lengths = block_lanczos(operator, starts, steps)
    nodes, weights = torch.zeros_like(alphas), torch.zeros_like(alphas)
    for run, length in enumerate(lengths):
        nodes[run, :length], weights[run, :length] = tridiagonal_quadrature(alphas[run, :length], betas[run, : length - 1])
        nodes[run, length:] = nodes[run, length - 1]
    return nodes, weights
