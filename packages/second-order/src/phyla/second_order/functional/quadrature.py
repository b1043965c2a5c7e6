"""Gauss quadrature of a tridiagonal matrix, and densities on a grid. Pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phyla.shared import checks

__all__ = ["gaussian_density", "marchenko_pastur_density", "semicircle_density", "tridiagonal_quadrature"]


def tridiagonal_quadrature(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss rule of a Jacobi matrix: `T = Y diag(nodes) Yᵀ`, weights are the squares of the first row of Y.

    Args:
        alphas: (..., m), the diagonal.
        betas: (..., m - 1), the off-diagonal.

    Returns: nodes, ascending, and weights, which sum to one; (..., m) each, float64.
    Raises: TypeError, ValueError for tensors that are not of these shapes.
    Source: Golub and Welsch 1969, "Calculation of Gauss Quadrature Rules".
    """
    checks.floating("alphas", alphas)
    checks.shape("betas", checks.floating("betas", betas), (*alphas.shape[:-1], max(alphas.shape[-1] - 1, 0)))
    off = torch.diag_embed(betas.double(), 1)
    nodes, vectors = torch.linalg.eigh(torch.diag_embed(alphas.double()) + off + off.mT)
    return nodes, vectors[..., 0, :].square()


def gaussian_density(nodes: Tensor, weights: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    """`Σ_k weights_k N(grid; nodes_k, bandwidth²)`.

    Args:
        nodes: (..., m).
        weights: (..., m).
        grid: (n,).
        bandwidth: standard deviation, positive, in the units of the nodes.

    Returns: (..., n).
    Raises: TypeError, ValueError for a bandwidth that is not positive.
    """
    checks.in_range("bandwidth", bandwidth, 0.0, low_open=True)
    z = (grid - nodes.unsqueeze(-1)) / bandwidth  # (..., m, n)
    bells = z.square_().mul_(-0.5).exp_() if not z.requires_grad else (-0.5 * z.square()).exp()
    return (weights.unsqueeze(-2) @ bells).squeeze(-2) / (bandwidth * math.sqrt(2 * math.pi))


def semicircle_density(x: Tensor, radius: float) -> Tensor:
    """Wigner's semicircle `2 sqrt(radius² - x²) / (π radius²)` on [-radius, radius], zero elsewhere; the shape of `x`.

    Raises: TypeError, ValueError for a radius that is not positive.
    """
    checks.in_range("radius", radius, 0.0, low_open=True)
    return 2 / (math.pi * radius**2) * (radius**2 - x.square()).clamp(min=0).sqrt()


def marchenko_pastur_density(x: Tensor, ratio: float, variance: float) -> Tensor:
    """The continuous part of the Marchenko-Pastur law of `XᵀX / n`, X of n rows and P columns with entries of `variance`.

    For `ratio > 1` the law has a mass of `1 - 1/ratio` at zero besides; the density integrates to the rest.

    Args:
        x: points, any shape.
        ratio: P / n, positive.
        variance: positive.

    Returns: the shape of `x`.
    Raises: TypeError, ValueError for a ratio or a variance that is not positive.
    """
    checks.in_range("ratio", ratio, 0.0, low_open=True)
    checks.in_range("variance", variance, 0.0, low_open=True)
    low, high = (variance * (1 + sign * math.sqrt(ratio)) ** 2 for sign in (-1, 1))
    inside = (x > low) & (x < high) & (x > 0)
    root = ((high - x) * (x - low)).clamp(min=0).sqrt()
    return torch.where(inside, root / (2 * math.pi * variance * ratio * torch.where(inside, x, torch.ones_like(x))), torch.zeros_like(x))
