"""Group-rational (safe Padé) functions of a tensor."""

from typing import Literal

import torch
from torch import Tensor

from phyla.shared import checks
from phyla.shared.kernels import Kernel

Form = Literal["sum_abs", "abs_sum"]


def _composite(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int) -> Tensor:
    groups = max(numerator.shape[0], denominator.shape[0])
    x_G = torch.unflatten(x, dim, (groups, x.shape[dim] // groups))  # group axis at `dim`, its channels right of it
    trailing = (1,) * (-dim)
    a = [c.reshape(-1, *trailing) for c in numerator.unbind(1)]
    b = [c.reshape(-1, *trailing) for c in denominator.unbind(1)]
    p = a[-1] + torch.zeros_like(x_G)
    for a_i in reversed(a[:-1]):
        p = torch.addcmul(a_i, p, x_G)
    if form == "sum_abs":
        u, b = x_G.abs(), [c.abs() for c in b]
    else:
        u = x_G
    q = b[-1] * u
    for b_i in reversed(b[:-1]):
        q = (q + b_i) * u
    return torch.flatten(p / (1 + q.abs()), dim - 1, dim)


_rational = Kernel(
    "phyla_kan_family::rational(Tensor x, Tensor numerator, Tensor denominator, str form, int dim) -> Tensor",
    _composite,
    differentiable=("x", "numerator", "denominator"),
    fake=lambda x, numerator, denominator, form, dim: torch.empty_like(x, memory_format=torch.contiguous_format),
    autocast=("x",),
)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, *, form: Form = "sum_abs", dim: int = -1) -> Tensor:
    r"""Evaluate one rational function for each group of consecutive channels, `P(x) / Q(x)`.

    `P = a_0 + a_1 x + .. + a_m x^m`; `Q = 1 + |b_1||x| + .. + |b_n||x|^n` for `form="sum_abs"`, and
    `Q = 1 + |b_1 x + .. + b_n x^n|` for `form="abs_sum"`: no poles, whatever the coefficients.
    The derivative of `|.|` at zero is taken as zero.

    Args:
        x: Any shape; `x.shape[dim]` channels, cut into equal consecutive groups.
        numerator: `(1 or groups, m + 1)`, `a_0` first. One row is shared by all groups.
        denominator: `(1 or groups, n)`, `b_1` first. One row is shared by all groups.
        form: Where the absolute value stands in `Q`.
        dim: The channel dimension.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        TypeError: If an argument is no floating tensor.
        ValueError: If the coefficients are not two-dimensional, the row counts or devices disagree, the channels cannot be divided
            into the groups, or `form` is unknown.

    Source: "Kolmogorov-Arnold Transformer", section 4.2 (`abs_sum` is the printed formula, `sum_abs` that of the released weights).
    """
    checks.choice("form", form, ("sum_abs", "abs_sum"))
    checks.floating("x", x)
    for name, c in (("numerator", numerator), ("denominator", denominator)):
        if checks.floating(name, c).ndim != 2 or c.shape[0] == 0 or c.shape[1] == 0:
            raise ValueError(f"{name}: expected shape (1 or groups, coefficients), got {tuple(c.shape)}")
        if c.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {c.device}")
    groups = max(numerator.shape[0], denominator.shape[0])
    if numerator.shape[0] not in (1, groups) or denominator.shape[0] not in (1, groups):
        raise ValueError(f"denominator: expected 1 or {numerator.shape[0]} rows as numerator has, got {denominator.shape[0]}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: expected a dimension of x with shape {tuple(x.shape)}, got {dim}")
    if x.shape[dim] % groups:
        raise ValueError(f"x: expected size of dimension {dim} divisible by {groups} groups, got shape {tuple(x.shape)}")
    y: Tensor = _rational(x, numerator, denominator, form, dim - x.ndim if dim >= 0 else dim)
    return y
