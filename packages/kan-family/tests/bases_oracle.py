"""Basis functions, layers and convolutions straight from their equations: one point at a time, float64, Python loops."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Curves = Callable[[float, int], list[float]]  # (x, input) -> K values


def bspline(x: float, t: Sequence[float], order: int) -> list[float]:
    def n(m: int, p: int) -> float:
        if p == 0:
            return float(t[m] <= x < t[m + 1])
        left = (x - t[m]) / (t[m + p] - t[m]) * n(m, p - 1) if t[m + p] > t[m] else 0.0
        right = (t[m + p + 1] - x) / (t[m + p + 1] - t[m + 1]) * n(m + 1, p - 1) if t[m + p + 1] > t[m + 1] else 0.0
        return left + right

    return [n(m, order) for m in range(len(t) - order - 1)]


def relu_bump(x: float, low: Sequence[float], high: Sequence[float], scale: float, power: int) -> list[float]:
    return [(max(x - a, 0) * max(b - x, 0) * scale) ** power for a, b in zip(low, high, strict=True)]


def fourier(x: float, frequencies: int) -> list[float]:
    return [f(m * x) for f in (math.cos, math.sin) for m in range(1, frequencies + 1)]


def squashed(x: float, squash: str) -> float:
    return {"tanh": math.tanh(x), "clamp": min(max(x, -1.0), 1.0), "none": x}[squash]


def chebyshev(x: float, degree: int, squash: str) -> list[float]:
    """By the trigonometric and hyperbolic definitions."""
    z = squashed(x, squash)
    if abs(z) <= 1:
        return [math.cos(n * math.acos(z)) for n in range(degree + 1)]
    return [(math.copysign(1, z) ** n) * math.cosh(n * math.acosh(abs(z))) for n in range(degree + 1)]


def jacobi(x: float, degree: int, a: float, b: float, squash: str) -> list[float]:
    """By the explicit sum over powers of (z - 1) / 2."""
    z = squashed(x, squash)

    def p(n: int) -> float:
        total = sum(math.comb(n, s) * math.gamma(a + b + n + s + 1) / math.gamma(a + s + 1) * ((z - 1) / 2) ** s for s in range(n + 1))
        return math.gamma(a + n + 1) / (math.factorial(n) * math.gamma(a + b + n + 1)) * total

    return [1.0, *(p(n) for n in range(1, degree + 1))]


def rbf(x: float, centers: Sequence[float], inv_width: float) -> list[float]:
    return [math.exp(-(((x - c) * inv_width) ** 2)) for c in centers]


def rswaf(x: float, centers: Sequence[float], inv_width: float) -> list[float]:
    return [1 - math.tanh((x - c) * inv_width) ** 2 for c in centers]


def wavelet(x: float, translation: Sequence[float], scale: Sequence[float], kind: str) -> list[float]:
    mother = {
        "mexican_hat": lambda u: 2 / (math.sqrt(3) * math.pi**0.25) * (u * u - 1) * math.exp(-u * u / 2),
        "morlet": lambda u: math.cos(5 * u) * math.exp(-u * u / 2),
        "dog": lambda u: -u * math.exp(-u * u / 2),
    }[kind]
    return [mother((x - c) / w) for c, w in zip(translation, scale, strict=True)]


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "identity": lambda v: v,
    "relu": lambda v: max(v, 0.0),
    "leaky_relu": lambda v: v if v > 0 else 0.01 * v,
    "silu": lambda v: v / (1 + math.exp(-v)),
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "tanh": math.tanh,
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "softplus": lambda v: math.log1p(math.exp(v)),
    "elu": lambda v: v if v > 0 else math.expm1(v),
    "selu": lambda v: 1.0507009873554804934193349852946 * (v if v > 0 else 1.6732632423543772848170429916717 * math.expm1(v)),
}
COMBINATIONS: dict[str, Callable[[float, float], float]] = {
    "quad1": lambda u, v: (u * v) ** 2,
    "quad2": lambda u, v: u * v + u * u + v * v,
    "sum": lambda u, v: u + v,
    "prod": lambda u, v: u * v,
    "sum_prod": lambda u, v: u + v + u * v,
    "cubic1": lambda u, v: (u + v) * (u * u + v * v),
    "cubic2": lambda u, v: (u * v) ** 3,
}


def activation_pair(x: float, low: Sequence[float], high: Sequence[float], activation: str, combine: str) -> list[float]:
    s, c = ACTIVATIONS[activation], COMBINATIONS[combine]
    return [c(s(x - a), s(b - x)) for a, b in zip(low, high, strict=True)]


def expand(x: Tensor, curves: Curves) -> Tensor:
    """`(B, I) -> (B, I, K)`."""
    return torch.tensor([[curves(v, i) for i, v in enumerate(row)] for row in x.tolist()], dtype=torch.float64)


def linear(x: Tensor, coef: Tensor, base_weight: Tensor | None, base: str, curves: Curves) -> Tensor:
    """Equation (1) of the layer, `(B, I) -> (B, O)`."""
    y = torch.einsum("bik,oik->bo", expand(x, curves), coef)
    if base_weight is None:
        return y
    raw = torch.tensor([[ACTIVATIONS[base](v) for v in row] for row in x.tolist()], dtype=torch.float64)
    return y + torch.einsum("bi,oi->bo", raw, base_weight)


def convolution(x: Tensor, coef: Tensor, base_weight: Tensor, stride: int, padding: int, pad: str, curves: Curves) -> Tensor:
    """A two-dimensional SiLU-based convolution tap by tap, `(N, C, H, W) -> (N, O, H', W')`."""
    n, c, h, w = x.shape
    o, _, _, kh, kw = coef.shape
    rows, cols = ((s + 2 * padding - k) // stride + 1 for s, k in ((h, kh), (w, kw)))
    y = torch.zeros(n, o, rows, cols, dtype=torch.float64)
    for at in torch.cartesian_prod(*(torch.arange(s) for s in (n, rows, cols, c, kh, kw))).tolist():
        sample, row, col, channel, a, b = at
        i, j = row * stride + a - padding, col * stride + b - padding
        inside = 0 <= i < h and 0 <= j < w
        if not inside and pad == "features":
            continue
        value = float(x[sample, channel, i, j]) if inside else 0.0
        phi = torch.tensor(curves(value, channel), dtype=torch.float64)
        y[sample, :, row, col] += coef[:, channel, :, a, b] @ phi + base_weight[:, channel, a, b] * ACTIVATIONS["silu"](value)
    return y
