"""`y_o = sum_i sum_k c_oik B_k(x_i) [+ sum_i w_oi b(x_i)]`, for every basis, without a `(B, I, K)` tensor.

One op serves all bases; it is a tile of basis values and a GEMM, over and over. Backward recomputes the tiles.

Legend: B rows, I inputs, O outputs, K basis functions of an input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phyla.kan_family.functional.basis import activate, evaluate
from phyla.shared import checks
from phyla.shared.kernels import Kernel

__all__ = ["bspline_linear", "chebyshev_linear", "fourier_linear", "rbf_linear", "relu_bump_linear"]

_TILE_ELEMENTS = 1 << 20  # of basis values: 4 MiB of float32


def _basis_linear_composite(
    x: Tensor,
    coef: Tensor,
    base_weight: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    kind: str,
    base: str,
    ints: Sequence[int],
    floats: Sequence[float],
) -> Tensor:
    outputs, inputs, functions = coef.shape
    weight = coef if base_weight is None else torch.cat([coef, base_weight.unsqueeze(-1)], -1)
    weight_t = weight.reshape(outputs, -1).t()
    rows = max(1, _TILE_ELEMENTS // max(1, inputs * (functions + 1)))
    tiles = []
    for tile in torch.split(x, rows):
        phi = evaluate(tile, first, second, kind, ints, floats)
        if base_weight is not None:
            phi = torch.cat([phi, activate(tile, base).unsqueeze(-1)], -1)
        tiles.append(phi.flatten(-2) @ weight_t)
    return torch.cat(tiles)


_basis_linear = Kernel(
    "phyla_kan_family::basis_linear(Tensor x, Tensor coef, Tensor? base_weight, Tensor? first, Tensor? second, str kind, str base, "
    "int[] ints, float[] floats) -> Tensor",
    _basis_linear_composite,
    differentiable=("x", "coef", "base_weight", "first", "second"),
    fake=lambda x, coef, *_: x.new_empty(x.shape[0], coef.shape[0]),
    autocast=("x", "coef", "base_weight"),
)


def basis_linear(
    x: Tensor,
    coef: Tensor,
    kind: str,
    *,
    first: Tensor | None = None,
    second: Tensor | None = None,
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
    base_weight: Tensor | None = None,
    base: str = "silu",
    bias: Tensor | None = None,
) -> Tensor:
    """The contraction of a basis with its coefficients, and of a base activation with its weights; see `basis.evaluate` for the arguments.

    Args:
        x: `(..., I)`.
        coef: `(O, I, K)`.
        base_weight: `(O, I)`, or None for no base branch.
        base: activation of the base branch.
        bias: `(O,)`.

    Returns:
        `(..., O)`.
    """
    checks.floating("x", x)
    checks.last_dim("x", x, checks.shape("coef", coef, (None, None, None)).shape[1])
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _basis_linear(rows, coef, base_weight, first, second, kind, base, list(ints), list(floats))
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], coef.shape[0])


def basis_expand(
    x: Tensor,
    kind: str,
    *,
    first: Tensor | None = None,
    second: Tensor | None = None,
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
) -> Tensor:
    """Basis values `(..., I) -> (..., I, K)`; see `basis.evaluate` for the arguments."""
    return evaluate(checks.floating("x", x), first, second, kind, ints, floats)


def bspline_linear(x: Tensor, coef: Tensor, knots: Tensor, order: int = 3, bias: Tensor | None = None) -> Tensor:
    """Sums of B-splines on every edge.

    Args:
        x: `(..., I)`.
        coef: `(O, I, K)`.
        knots: `(I, K + order + 1)`, non-decreasing; a constant, without gradient.
        order: polynomial degree of the pieces.
        bias: `(O,)`.

    Returns:
        `(..., O)`.

    Raises:
        ValueError: If a shape does not fit.

    Source: "KAN: Kolmogorov-Arnold Networks", equations 2.5 and 2.10.
    """
    checks.positive_int("order", order)
    _, inputs, functions = checks.shape("coef", coef, (None, None, None)).shape
    checks.shape("knots", knots, (inputs, functions + order + 1))
    return basis_linear(x, coef, "bspline", first=knots, ints=(order, 0), bias=bias)


def relu_bump_linear(
    x: Tensor, coef: Tensor, low: Tensor, high: Tensor, *, scale: float, power: int = 2, bias: Tensor | None = None
) -> Tensor:
    """Sums of ReLU bumps on every edge; `x (..., I)`, `coef (O, I, K)`, other arguments as in `relu_bump_basis`. Returns `(..., O)`."""
    checks.positive_int("power", power)
    _check_parameters(coef, "low", low)
    _check_parameters(coef, "high", high)
    return basis_linear(x, coef, "relu_bump", first=low, second=high, ints=(power,), floats=(scale,), bias=bias)


def fourier_linear(x: Tensor, coef: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fourier sums on every edge; `x (..., I)`, `coef (O, I, 2 G)` with the cosines first. Returns `(..., O)`."""
    functions = checks.shape("coef", coef, (None, None, None)).shape[2]
    if functions == 0 or functions % 2:
        raise ValueError(f"coef: expected an even number of basis functions, got shape {tuple(coef.shape)}")
    return basis_linear(x, coef, "fourier", ints=(functions // 2,), bias=bias)


def chebyshev_linear(x: Tensor, coef: Tensor, bias: Tensor | None = None) -> Tensor:
    """Chebyshev sums on every edge, without squashing; `x (..., I)`, `coef (O, I, degree + 1)`. Returns `(..., O)`."""
    functions = checks.shape("coef", coef, (None, None, None)).shape[2]
    if functions < 2:
        raise ValueError(f"coef: expected at least 2 basis functions, got shape {tuple(coef.shape)}")
    return basis_linear(x, coef, "chebyshev", ints=(functions - 1, 0), bias=bias)


def rbf_linear(x: Tensor, coef: Tensor, centers: Tensor, inv_width: float, bias: Tensor | None = None) -> Tensor:
    """Sums of Gaussian bumps on every edge; `x (..., I)`, `coef (O, I, K)`, other arguments as in `rbf_basis`. Returns `(..., O)`."""
    _check_parameters(coef, "centers", centers)
    return basis_linear(x, coef, "rbf", first=centers, floats=(inv_width,), bias=bias)


def _check_parameters(coef: Tensor, name: str, rows: Tensor) -> None:
    _, inputs, functions = checks.shape("coef", coef, (None, None, None)).shape
    checks.shape(name, rows, (functions,) if rows.dim() == 1 else (inputs, functions))
