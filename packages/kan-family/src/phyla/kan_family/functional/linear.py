"""`y_o = sum_i sum_k c_oik B_k(x_i) [+ sum_i w_oi b(x_i)]`, for every basis, without a `(B, I, K)` tensor.

One op serves all bases; it is a tile of basis values and a GEMM, over and over. Backward recomputes the tiles.

Legend: B rows, I inputs, O outputs, K basis functions of an input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor

from phyla.kan_family.functional.basis import activate, evaluate, splines
from phyla.shared import checks
from phyla.shared.kernels import Kernel

__all__ = ["bspline_linear", "chebyshev_linear", "fourier_linear", "rbf_linear", "relu_bump_linear"]

_TILE_ROWS = 1 << 10
_TILE_ELEMENTS = 1 << 18  # of basis values: 1 MiB of float32


def _contract(
    x: Tensor, coef: Tensor, first: Tensor | None, second: Tensor | None, kind: str, ints: Sequence[int], floats: Sequence[float]
) -> Tensor:
    return evaluate(x, first, second, kind, ints, floats).flatten(-2) @ coef.flatten(1).t()


def _blocks(x: Tensor, coef: Tensor, first: Tensor | None, second: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """The arguments for one block of inputs after the other: as many inputs as make a tile of values."""
    size = max(1, _TILE_ELEMENTS // max(1, x.shape[0] * coef.shape[2]))
    parameters = (repeat(p) if p is None or p.dim() == 1 else torch.split(p, size) for p in (first, second))
    return zip(torch.split(x, size, 1), torch.split(coef, size, 1), *parameters, strict=False)


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # by x, coef, first, second, where they are needed


def _gradients(
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    coef: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    kind: str,
    ints: Sequence[int],
    floats: Sequence[float],
) -> _Gradients:
    """The vector-Jacobian product of `_contract`, of differentiable operations."""
    if kind == "bspline" and first is not None:
        return _spline_gradients(grad, needs, x, coef, first, ints[0], bool(ints[1]))
    points = (x, first, second)
    moved = [i for i, need in enumerate((needs[0], *needs[2:])) if need]

    def values(*at: Tensor) -> Tensor:
        given = dict(zip(moved, at, strict=True))
        return evaluate(given.get(0, x), given.get(1, first), given.get(2, second), kind, ints, floats)

    phi, pullback = cast(Any, torch.func.vjp(values, *(points[i] for i in moved)))
    by = dict(zip(moved, pullback((grad @ coef.flatten(1)).view(phi.shape)), strict=True)) if moved else {}
    return by.get(0), (grad.t() @ phi.flatten(1)).view(coef.shape) if needs[1] else None, by.get(1), by.get(2)


def _spline_gradients(grad: Tensor, needs: Sequence[bool], x: Tensor, coef: Tensor, knots: Tensor, order: int, linear: bool) -> _Gradients:
    phi, slopes = splines(x.t(), knots, order, linear)  # (I, K, B)
    by_phi = (coef.flatten(1).t() @ grad.t()).view(phi.shape) if needs[0] else None
    return (
        None if by_phi is None else (by_phi * slopes).sum(1).t(),
        (grad.t() @ phi.flatten(0, 1).t()).view(coef.shape) if needs[1] else None,
        None,
        None,
    )


class _Tiled(torch.autograd.Function):
    """`_contract` tile by tile. Backward evaluates the basis again, so that the values of one tile at a time are alive."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        x, coef, first, second, *constants = args
        results = []
        for rows in torch.split(x, _TILE_ROWS):
            y = rows.new_zeros(rows.shape[0], coef.shape[0])
            for part, weight, *parameters in _blocks(rows, coef, first, second):
                y = torch.addmm(y, evaluate(part, *parameters, *constants).flatten(-2), weight.flatten(1).t())
            results.append(y)
        return torch.cat(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.constants = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        by_x: list[Tensor] = []
        sums: list[Tensor | None] = [None, None, None]
        for rows, grad_rows in zip(torch.split(x, _TILE_ROWS), torch.split(grad, _TILE_ROWS), strict=True):
            tiles = [_gradients(grad_rows, ctx.needs_input_grad[:4], *block, *ctx.constants) for block in _blocks(rows, *rest)]
            first, *others = zip(*tiles, strict=True)
            if first[0] is not None:
                by_x.append(torch.cat(first, 1))
            for j, parts in enumerate(others):
                if parts[0] is not None:
                    part = sum(parts) if rest[j].dim() == 1 else torch.cat(parts, int(j == 0))
                    sums[j] = part if (before := sums[j]) is None else before + part
        return torch.cat(by_x) if by_x else None, *sums, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        args = (*ctx.saved_tensors, *ctx.constants)
        moved = [i for i in range(4) if tangents[i] is not None]

        def contract(*at: Tensor) -> Tensor:
            given = dict(zip(moved, at, strict=True))
            return _contract(*(given.get(i, a) for i, a in enumerate(args)))

        # The pullback is linear in its argument; its own transpose is the push-forward.
        out, pullback = cast(Any, torch.func.vjp(contract, *(args[i] for i in moved)))
        return torch.func.vjp(pullback, torch.zeros_like(out))[1](tuple(tangents[i] for i in moved))[0]


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
    if torch.compiler.is_compiling():  # the compiler decides itself what it keeps and what it computes again
        y = torch.cat([_contract(rows, coef, first, second, kind, ints, floats) for rows in torch.split(x, _TILE_ROWS)])
    else:
        y = cast(Any, _Tiled).apply(x, coef, first, second, kind, ints, floats)
    return y if base_weight is None else y + activate(x, base) @ base_weight.t()


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
