"""Basis functions of KAN layers in plain torch: `(..., I) -> (..., I, K)`, differentiable to any order.

Parameters of a basis have one row for each input, `(I, ...)`, or one row `(...)` that all inputs share. `evaluate` is the one door to all
of them: the linear layers and the convolutions name a basis by its kind and pass its constants as plain numbers.

Legend: I inputs, K basis functions of an input, k spline order, G grid intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.shared import checks

__all__ = [
    "activation_pair_basis",
    "bspline_basis",
    "chebyshev_basis",
    "fourier_basis",
    "jacobi_basis",
    "rbf_basis",
    "relu_bump_basis",
    "rswaf_basis",
    "wavelet_basis",
]

SQUASHES = ("none", "tanh", "clamp")
WAVELETS = ("mexican_hat", "morlet", "dog")
ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "sigmoid", "tanh", "gelu", "softplus", "elu", "selu")
COMBINATIONS = ("quad1", "quad2", "sum", "prod", "sum_prod", "cubic1", "cubic2")
BASES = ("silu", "gelu", "relu", "tanh", "identity")
KINDS = ("bspline", "relu_bump", "fourier", "chebyshev", "jacobi", "rbf", "rswaf", "wavelet", "activation_pair")

Outside = Literal["zero", "linear"]
WaveletKind = Literal["mexican_hat", "morlet", "dog"]
Combine = Literal["quad1", "quad2", "sum", "prod", "sum_prod", "cubic1", "cubic2"]
Activation = Literal["identity", "relu", "leaky_relu", "silu", "sigmoid", "tanh", "gelu", "softplus", "elu", "selu"]


def bspline_basis(x: Tensor, knots: Tensor, order: int = 3, *, outside: Outside = "zero") -> Tensor:
    """B-splines by the Cox-de Boor recursion.

    Args:
        x: `(..., I)`.
        knots: `(I, K + order + 1)`, non-decreasing; a constant, without gradient. Repeated knots are allowed.
        order: polynomial degree k of the pieces.
        outside: `"zero"`: every function is 0 outside `[t_0, t_last)`; `"linear"`: outside the interior grid `[t_k, t_K]` each function
            continues along its tangent.

    Returns:
        `(..., I, K)`.

    Raises:
        ValueError: If `knots` does not fit `x` and `order`.

    Source: "KAN: Kolmogorov-Arnold Networks", equation 2.10; de Boor, "A Practical Guide to Splines", chapter IX.
    """
    checks.positive_int("order", order)
    checks.last_dim("x", x, checks.shape("knots", knots, (None, None)).shape[0])
    checks.choice("outside", outside, ("zero", "linear"))
    least, count = ("order + 2", order + 2) if outside == "zero" else ("2 order + 2", 2 * order + 2)
    if knots.shape[1] < count:
        raise ValueError(f"knots: expected at least {least} = {count} knots per input, got shape {tuple(knots.shape)}")
    return _bspline(x, knots, order, outside == "linear")


def _bspline(x: Tensor, knots: Tensor, order: int, linear: bool) -> Tensor:
    phi = splines(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).t(), knots, order, linear)[0]
    return phi.permute(2, 0, 1).reshape(*x.shape, phi.shape[1])


def splines(x: Tensor, knots: Tensor, order: int, linear: bool) -> tuple[Tensor, Tensor]:
    """B-splines and their derivatives at N points, `(I, N) -> (I, K, N)` twice: inner loops are long. See `bspline_basis`."""
    t, functions, u = knots.detach(), knots.shape[1] - 1 - order, x.contiguous().unsqueeze(1)
    inside = torch.minimum(torch.maximum(u, t[:, order, None, None]), t[:, functions, None, None]) if linear else u
    past = inside - t.unsqueeze(-1)
    reached = (torch.sign(past.detach()) + 1).clamp(max=1)  # 1 where x is at or past the knot, else 0
    if linear:  # the last cell of the interior grid is closed: a piece is evaluated at its own end
        reached = reached * (torch.arange(t.shape[1], device=t.device) < functions).unsqueeze(-1)
    phi = reached[:, :-1] - reached[:, 1:]
    slopes = phi
    for p in range(1, order + 1):
        width = (t[:, p:] - t[:, :-p]).unsqueeze(-1)
        inverse = torch.where(width > 0, width, math.inf).reciprocal()
        if p == order:
            per_width = phi * (order * inverse)
            slopes = per_width[:, :-1] - per_width[:, 1:]
        rising = past[:, :-p] * inverse
        # The falling weight (t_{m+p+1} - x) / width is 1 - rising where phi is not 0.
        phi = torch.addcmul(torch.addcmul(phi[:, 1:], rising[:, :-1], phi[:, :-1]), rising[:, 1:], phi[:, 1:], value=-1)
    return phi + slopes * (u - inside) if linear else phi, slopes


def relu_bump_basis(x: Tensor, low: Tensor, high: Tensor, *, scale: float, power: int = 2) -> Tensor:
    """ReLU bumps `(relu(x - low) relu(high - x) scale)^power`.

    Args:
        x: `(..., I)`.
        low: left ends, `(I, K)` or `(K,)`.
        high: right ends, of the same shape.
        scale: `4 / width^2` makes the peak 1.
        power: 2 in ReLU-KAN; more makes the bumps smoother.

    Returns:
        `(..., I, K)`.

    Source: "ReLU-KAN: New Kolmogorov-Arnold Networks that Only Need Matrix Addition, Dot Multiplication, and ReLU", equation 6.
    """
    checks.positive_int("power", power)
    _check_rows(x, "low", low, "high", high)
    return _relu_bump(x, low, high, scale, power)


def _relu_bump(x: Tensor, low: Tensor, high: Tensor, scale: float, power: int) -> Tensor:
    u = x.unsqueeze(-1)
    return (F.relu(u - low) * F.relu(high - u) * scale) ** power


def fourier_basis(x: Tensor, num_frequencies: int) -> Tensor:
    """`[cos x, .., cos Gx, sin x, .., sin Gx]`, by rotation of `(cos x, sin x)`: the product `m x` would be rounded.

    Args:
        x: `(..., I)`.
        num_frequencies: G.

    Returns:
        `(..., I, 2 G)`.
    """
    checks.positive_int("num_frequencies", num_frequencies)
    cosine, sine = torch.cos(x).unsqueeze(-1), torch.sin(x).unsqueeze(-1)
    while cosine.shape[-1] < num_frequencies:
        # Frequencies m + 1 .. 2 m from 1 .. m and m.
        c, s = cosine[..., -1:], sine[..., -1:]
        cosine, sine = torch.cat([cosine, cosine * c - sine * s], -1), torch.cat([sine, sine * c + cosine * s], -1)
    return torch.cat([cosine[..., :num_frequencies], sine[..., :num_frequencies]], -1)


def _squash(x: Tensor, squash: int) -> Tensor:
    return torch.tanh(x) if squash == 1 else x.clamp(-1, 1) if squash == 2 else x


def chebyshev_basis(x: Tensor, degree: int) -> Tensor:
    """Chebyshev polynomials of the first kind `T_0 .. T_degree` by their recurrence, whose gradient is finite everywhere.

    Args:
        x: `(..., I)`; no squashing is done.
        degree: the highest degree.

    Returns:
        `(..., I, degree + 1)`.
    """
    checks.positive_int("degree", degree)
    values = [torch.ones_like(x), x]
    for _ in range(degree - 1):
        values.append(2 * x * values[-1] - values[-2])
    return torch.stack(values, -1)


def jacobi_recurrence(degree: int, alpha: float, beta: float) -> list[tuple[float, float, float]]:
    """Coefficients `(A, C, D)` of `P_n = (A x + C) P_{n-1} - D P_{n-2}` for n = 1 .. degree."""
    a, b = alpha, beta
    rows = [((a + b + 2) / 2, (a - b) / 2, 0.0)]
    for n in range(2, degree + 1):
        s, scale = 2 * n + a + b, 2 * n * (n + a + b)
        rows.append(
            (s * (s - 1) / scale, (s - 1) * (a * a - b * b) / (scale * (s - 2)), 2 * (n + a - 1) * (n + b - 1) * s / (scale * (s - 2)))
        )
    return rows


def jacobi_basis(x: Tensor, degree: int, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Jacobi polynomials `P_0 .. P_degree` with parameters `(alpha, beta)`; Legendre polynomials are `(0, 0)`.

    Args:
        x: `(..., I)`; no squashing is done.
        degree: the highest degree.
        alpha: above -1.
        beta: above -1.

    Returns:
        `(..., I, degree + 1)`.

    Raises:
        ValueError: If a parameter is at most -1.
    """
    checks.positive_int("degree", degree)
    checks.in_range("alpha", alpha, -1.0, low_open=True)
    checks.in_range("beta", beta, -1.0, low_open=True)
    values, before = [torch.ones_like(x)], torch.zeros_like(x)
    for scale, shift, back in jacobi_recurrence(degree, alpha, beta):
        values.append((scale * x + shift) * values[-1] - back * before)
        before = values[-2]
    return torch.stack(values, -1)


def rbf_basis(x: Tensor, centers: Tensor, inv_width: float) -> Tensor:
    """Gaussian bumps `exp(-((x - c) inv_width)^2)`.

    Args:
        x: `(..., I)`.
        centers: `(K,)` or `(I, K)`.
        inv_width: inverse width.

    Returns:
        `(..., I, K)`.
    """
    _check_rows(x, "centers", centers)
    return torch.exp(-(((x.unsqueeze(-1) - centers) * inv_width) ** 2))


def rswaf_basis(x: Tensor, centers: Tensor, inv_width: float = 1.0) -> Tensor:
    """Reflectional switch functions `1 - tanh^2((x - c) inv_width)`; arguments as in `rbf_basis`."""
    _check_rows(x, "centers", centers)
    return 1 - torch.tanh((x.unsqueeze(-1) - centers) * inv_width) ** 2


def wavelet_basis(x: Tensor, translation: Tensor, scale: Tensor, kind: WaveletKind = "mexican_hat") -> Tensor:
    """Wavelets of `u = (x - translation) / scale`.

    `mexican_hat`: `2 / (sqrt(3) pi^(1/4)) (u^2 - 1) exp(-u^2 / 2)`; `morlet`: `cos(5 u) exp(-u^2 / 2)`; `dog`: `-u exp(-u^2 / 2)`.

    Args:
        x: `(..., I)`.
        translation: `(I, K)` or `(K,)`.
        scale: of the same shape; an exact 0 counts as the dtype's epsilon.
        kind: the mother wavelet.

    Returns:
        `(..., I, K)`.

    Source: "Wav-KAN: Wavelet Kolmogorov-Arnold Networks", table 1.
    """
    checks.choice("kind", kind, WAVELETS)
    _check_rows(x, "translation", translation, "scale", scale)
    return _wavelet(x, translation, scale, WAVELETS.index(kind))


def _wavelet(x: Tensor, translation: Tensor, scale: Tensor, kind: int) -> Tensor:
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    u = (x.unsqueeze(-1) - translation) / scale
    envelope = torch.exp(-0.5 * u * u)
    if kind == 0:
        return (u * u - 1) * envelope * (2 / math.sqrt(3 * math.sqrt(math.pi)))
    return torch.cos(5 * u) * envelope if kind == 1 else -u * envelope


def activation_pair_basis(x: Tensor, low: Tensor, high: Tensor, *, activation: Activation = "silu", combine: Combine = "quad1") -> Tensor:
    """Two facing activations `u = s(x - low)`, `v = s(high - x)`, combined.

    `quad1`: `(uv)^2`; `quad2`: `uv + u^2 + v^2`; `sum`: `u + v`; `prod`: `uv`; `sum_prod`: `u + v + uv`; `cubic1`: `(u + v)(u^2 + v^2)`;
    `cubic2`: `(uv)^3`.

    Args:
        x: `(..., I)`.
        low: left ends, `(K,)` or `(I, K)`.
        high: right ends, of the same shape.
        activation: the function s.
        combine: the combination.

    Returns:
        `(..., I, K)`.

    Source: "AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks for Efficient Representation Learning", section 3.
    """
    checks.choice("activation", activation, ACTIVATIONS)
    checks.choice("combine", combine, COMBINATIONS)
    _check_rows(x, "low", low, "high", high)
    return _activation_pair(x, low, high, ACTIVATIONS.index(activation), COMBINATIONS.index(combine))


def _activation_pair(x: Tensor, low: Tensor, high: Tensor, activation: int, combine: int) -> Tensor:
    u, v = activate(x.unsqueeze(-1) - low, ACTIVATIONS[activation]), activate(high - x.unsqueeze(-1), ACTIVATIONS[activation])
    match COMBINATIONS[combine]:
        case "quad1":
            return (u * v) ** 2
        case "quad2":
            return u * v + u * u + v * v
        case "sum":
            return u + v
        case "prod":
            return u * v
        case "sum_prod":
            return u + v + u * v
        case "cubic1":
            return (u + v) * (u * u + v * v)
        case _:
            return (u * v) ** 3


def activate(x: Tensor, name: str) -> Tensor:
    """An activation by its name, one of `ACTIVATIONS`."""
    if name == "identity":
        return x
    result: Tensor = getattr(torch if name in ("sigmoid", "tanh") else F, name)(x)
    return result


def evaluate(x: Tensor, first: Tensor | None, second: Tensor | None, kind: str, ints: Sequence[int], floats: Sequence[float]) -> Tensor:
    """Basis functions by kind: `(..., I) -> (..., I, K)`.

    Args:
        x: `(..., I)`.
        first: knots, low ends, centres or translations.
        second: high ends or scales.
        kind: one of `KINDS`.
        ints: `bspline`: order, linear outside; `relu_bump`: power; `fourier`: G; `chebyshev`, `jacobi`: degree, squash; `wavelet`: kind;
            `activation_pair`: activation, combination. Choices are indices into the tuples of this module.
        floats: `relu_bump`: scale; `jacobi`: alpha, beta; `rbf`, `rswaf`: inverse width.
    """
    match kind, first, second:
        case "fourier", None, None:
            return fourier_basis(x, ints[0])
        case "chebyshev", None, None:
            return chebyshev_basis(_squash(x, ints[1]), ints[0])
        case "jacobi", None, None:
            return jacobi_basis(_squash(x, ints[1]), ints[0], floats[0], floats[1])
        case "bspline", Tensor(), None:
            return _bspline(x, first, ints[0], bool(ints[1]))
        case "rbf", Tensor(), None:
            return rbf_basis(x, first, floats[0])
        case "rswaf", Tensor(), None:
            return rswaf_basis(x, first, floats[0])
        case "relu_bump", Tensor(), Tensor():
            return _relu_bump(x, first, second, floats[0], ints[0])
        case "wavelet", Tensor(), Tensor():
            return _wavelet(x, first, second, ints[0])
        case "activation_pair", Tensor(), Tensor():
            return _activation_pair(x, first, second, ints[0], ints[1])
    raise ValueError(f"kind: expected one of {KINDS} with its parameters, got {kind!r}")


def _check_rows(x: Tensor, name: str, rows: Tensor, other_name: str | None = None, other: Tensor | None = None) -> None:
    """Basis parameters are `(I, K)` or `(K,)`, all of one shape."""
    if rows.dim() == 2:
        checks.last_dim("x", x, rows.shape[0])
    elif rows.dim() != 1:
        raise ValueError(f"{name}: expected shape (K,) or (I, K), got shape {tuple(rows.shape)}")
    if other_name is not None and other is not None:
        checks.shape(other_name, other, tuple(rows.shape))
