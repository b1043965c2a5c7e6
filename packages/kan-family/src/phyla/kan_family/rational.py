"""Group-rational activation and the two-layer GR-KAN block that replaces a transformer's MLP.

Source: "Kolmogorov-Arnold Transformer", sections 4.1 to 4.4.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls
from torch import Tensor, nn

from phyla.kan_family.functional.rational import Form, rational
from phyla.shared import checks

Function = Callable[[Tensor], Tensor]
Array = NDArray[np.floating[Any]]

# Fits of degree (5, 4) on [-3, 3] for form="sum_abs": numerator a_0..a_5, denominator b_1..b_4.
_COEFFICIENTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "silu": (
        (3.054879741161051e-07, 0.5000007853744493, 0.24999783422824703, 0.05326628273219478, 0.005803034571292244, 0.0002751961022402342),
        (-4.111554955950634e-06, 0.10652899335007572, -1.2690007399796238e-06, 0.0005502331264140556),
    ),
    "gelu": (
        (-0.001303844136, 0.5000421759, 0.40838045, 0.1076454229, 0.009118543766, 8.99823645e-05),
        (1.279465217e-05, 0.215332955, 2.128098943e-06, 0.0001750516027),
    ),
    "tanh": (
        (0.0, 1.000017308, 0.0, 0.1070345822, 0.0, 0.000845092055),
        (9.121224148e-05, 0.4402562081, 0.0, 0.01435864569),
    ),
    "sigmoid": (
        (0.5000000005, 0.2499999928, 0.05543643081, 0.006884903494, 0.0004842696942, 1.559942435e-05),
        (3.729780461e-09, 0.1108728573, 1.869660141e-09, 0.0009685391146),
    ),
    "relu": (
        (0.01340921405, 0.5245054675, 2.792384024, 4.334677585, 2.382449719, 0.415815021),
        (0.4759274259, 7.742847622, 0.572889183, 0.724495152),
    ),
    "leaky_relu": (
        (0.01319846818, 0.5277030839, 2.754261794, 4.361919484, 2.349835648, 0.4183871421),
        (0.4378317873, 7.785365479, 0.5265288264, 0.7300736892),
    ),
    "mish": (
        (7.630402355e-05, 0.6004229153, 0.3194649665, 0.1302422422, 0.03330990145, 0.003404849871),
        (0.006912672309, 0.2251897002, 0.0201314068, 0.004108722378),
    ),
    "elu": (
        (0.0001892443165, 0.9982323912, 0.2409277135, 0.3113318263, 0.05565809533, 0.006040908531),
        (0.2399683893, 0.3089169783, 0.05773506554, 0.00562526149),
    ),
    "softplus": (
        (0.6931489668, 0.4999999844, 0.1810260129, 0.04042414201, 0.005364756834, 0.0003250224424),
        (2.634868972e-10, 0.0808482383, 2.771976706e-08, 0.0006500403108),
    ),
}
_FUNCTIONS: dict[str, Function] = {name: getattr(nn.functional, name) for name in _COEFFICIENTS}
_NAMES = ("identity", *_COEFFICIENTS, "swish")


def rational_gain(numerator: Tensor, denominator: Tensor, *, form: Form = "sum_abs") -> float:
    """Inverse second moment of a rational function under a standard normal input, `1 / E[F(z)^2]`.

    Weights drawn with variance `gain / fan_in` after the activation keep a unit mean square. Several groups count by their mean.

    Args:
        numerator: `(m + 1,)` or `(1 or groups, m + 1)`.
        denominator: `(n,)` or `(1 or groups, n)`.
        form: See `functional.rational`.

    Returns:
        The gain, by Gauss-Legendre quadrature on each side of zero, where `F` may have a kink.

    Source: "Kolmogorov-Arnold Transformer", section 4.4 (variance-preserving initialization).
    """
    a, b = (c.detach().to("cpu", torch.float64) for c in (numerator, denominator))
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = torch.from_numpy(6.0 * (nodes + 1.0))
    weight = torch.from_numpy(6.0 * weights) * torch.exp(-0.5 * half**2) / (2.0 * torch.pi) ** 0.5
    groups = max(a.shape[0], b.shape[0])
    z = torch.cat([-half, half])[:, None].expand(-1, groups)
    second_moment = (torch.cat([weight, weight])[:, None] * rational(z, a, b, form=form) ** 2).sum() / groups
    return float(1.0 / second_moment)


def fit_rational(
    fn: Function, *, degree: tuple[int, int] = (5, 4), interval: tuple[float, float] = (-3.0, 3.0), form: Form = "sum_abs"
) -> tuple[Tensor, Tensor]:
    """Fit a safe rational function to `fn`, close to the smallest maximum error on an interval.

    Nonlinear least squares on Chebyshev nodes from several starts, reweighted toward the nodes of large error (Lawson's
    iteration); the fit of smallest maximum error is returned. Deterministic. Outside the interval the fit drifts: both tails are
    polynomials of degree `m - n`.

    Args:
        fn: Elementwise function of a float64 tensor.
        degree: Degrees `(m, n)` of numerator and denominator.
        interval: Where to fit, `(low, high)`.
        form: See `functional.rational`.

    Returns:
        `numerator (m + 1,)` and `denominator (n,)`, float64.

    Raises:
        ValueError: If a degree is below 1, the interval is empty, or `fn` is not finite on it.
    """
    m, n = checks.positive_int("degree[0]", degree[0]), checks.positive_int("degree[1]", degree[1])
    checks.choice("form", form, ("sum_abs", "abs_sum"))
    low, high = interval
    if not low < high:
        raise ValueError(f"interval: expected low < high, got {interval}")
    nodes = np.cos(np.pi * (np.arange(401) + 0.5) / 401)  # odd: the middle, where activations have their kink, is a node
    x: Array = 0.5 * (low + high) + 0.5 * (high - low) * nodes
    target = fn(torch.from_numpy(x))
    checks.finite("fn", target)
    f: Array = target.detach().double().numpy()

    powers: Array = np.vander(x, max(m, n) + 1, increasing=True)
    p_basis = powers[:, : m + 1]
    q_basis: Array = np.abs(powers[:, 1 : n + 1]) if form == "sum_abs" else powers[:, 1 : n + 1]

    def denominator(b: Array) -> Array:
        return 1.0 + (q_basis @ np.abs(b) if form == "sum_abs" else np.abs(q_basis @ b))

    def residual(b: Array, weight: Array) -> Array:
        # Variable projection: for a given denominator the best numerator is a linear least-squares solution.
        design = np.linalg.qr((weight / denominator(b))[:, None] * p_basis)[0]
        distance: Array = design @ (design.T @ (weight * f)) - weight * f
        return distance

    exact = 1e-14 * max(1.0, float(np.abs(f).max()))
    best: tuple[float, Array, Array] | None = None
    for start in _starts(p_basis, q_basis, f, form):
        if best is not None and best[0] <= exact:
            break
        weight: Array = np.ones_like(f)
        b = start
        for _ in range(12):
            b = least_squares(residual, b, args=(weight,), x_scale="jac", max_nfev=60).x
            a: Array = np.linalg.lstsq((weight / denominator(b))[:, None] * p_basis, weight * f, rcond=None)[0]
            error: Array = np.abs(p_basis @ a / denominator(b) - f)
            if best is None or error.max() < best[0]:
                best = (float(error.max()), a, b)
            if error.max() <= exact:
                break
            weight *= np.sqrt(0.05 + error / error.max())
            weight /= weight.max()
    assert best is not None
    return torch.from_numpy(best[1]), torch.from_numpy(best[2])


def _starts(p_basis: Array, q_basis: Array, f: Array, form: Form) -> list[Array]:
    """Denominators to start from: the linearised problem `P - f (Q - 1) = f`, and fixed ones of increasing size."""
    n = q_basis.shape[1]
    project = np.linalg.qr(p_basis)[0]
    columns, rest = (z - project @ (project.T @ z) for z in (-f[:, None] * q_basis, f))
    linear = nnls(columns, rest)[0] if form == "sum_abs" else np.linalg.lstsq(columns, rest, rcond=None)[0]
    decay = 1.0 / np.cumprod(np.arange(1.0, n + 1))
    return [linear, 0.1 * decay**2, decay, np.full(n, 0.5), np.full(n, 5.0)]


def initial_coefficients(init: str | Function, *, degree: tuple[int, int] = (5, 4), form: Form = "sum_abs") -> tuple[Tensor, Tensor]:
    """Coefficients of a rational function that starts as a known activation.

    Args:
        init: A name (`"identity"`, `"silu"` or `"swish"`, `"gelu"`, `"tanh"`, `"sigmoid"`, `"relu"`, `"leaky_relu"`, `"mish"`, `"elu"`,
            `"softplus"`), or any elementwise function of a tensor, which is fitted.
        degree: Degrees `(m, n)`.
        form: See `functional.rational`.

    Returns:
        `numerator (m + 1,)` and `denominator (n,)`, float64; tabulated for degree (5, 4) and `"sum_abs"`, fitted on [-3, 3] otherwise.

    Raises:
        ValueError: If the name is unknown or a degree is below 1.
    """
    m, n = checks.positive_int("degree[0]", degree[0]), checks.positive_int("degree[1]", degree[1])
    checks.choice("form", form, ("sum_abs", "abs_sum"))
    if not isinstance(init, str):
        return fit_rational(init, degree=(m, n), form=form)
    name = checks.choice("init", init, _NAMES)
    if name == "identity":
        return torch.eye(m + 1, dtype=torch.float64)[1], torch.zeros(n, dtype=torch.float64)
    name = "silu" if name == "swish" else name
    a, b = _COEFFICIENTS[name] if (m, n, form) == (5, 4, "sum_abs") else _fitted(name, m, n, form)
    return torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)


@lru_cache(maxsize=64)
def _fitted(name: str, m: int, n: int, form: Form) -> tuple[tuple[float, ...], tuple[float, ...]]:
    a, b = fit_rational(_FUNCTIONS[name], degree=(m, n), form=form)
    return tuple(a.tolist()), tuple(b.tolist())


class GroupRational(nn.Module):
    """Learnable activation: one rational function `P(x)/Q(x)` for each group of channels.

    Args:
        num_groups: Groups of consecutive channels.
        degree: Degrees `(m, n)` of `P` and `Q`.
        init: Activation to start as; see `initial_coefficients`.
        form: `"sum_abs"`, `Q = 1 + sum_i |b_i| |x|^i`, or `"abs_sum"`, `Q = 1 + |sum_i b_i x^i|`.
        shared_numerator: One numerator for all groups.
        dim: The channel dimension of the input.

    Shape:
        Any shape with `x.shape[dim]` divisible by `num_groups` to the same shape.

    Attributes:
        numerator: `(1 or num_groups, m + 1)`, `a_0` first.
        denominator: `(num_groups, n)`, `b_1` first.

    Source: "Kolmogorov-Arnold Transformer", equation 9.
    """

    def __init__(
        self,
        *,
        num_groups: int = 8,
        degree: tuple[int, int] = (5, 4),
        init: str | Function = "silu",
        form: Form = "sum_abs",
        shared_numerator: bool = True,
        dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_groups = checks.positive_int("num_groups", num_groups)
        self.degree, self.init, self.form, self.dim = degree, init, form, dim
        a, b = initial_coefficients(init, degree=degree, form=form)
        rows = 1 if shared_numerator else num_groups
        self.numerator = nn.Parameter(torch.empty(rows, a.numel(), device=device, dtype=dtype))
        self.denominator = nn.Parameter(torch.empty(num_groups, b.numel(), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every group to the initial function."""
        a, b = initial_coefficients(self.init, degree=self.degree, form=self.form)
        self.numerator.copy_(a.expand_as(self.numerator))
        self.denominator.copy_(b.expand_as(self.denominator))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to `x`, any shape with `x.shape[dim]` divisible by `num_groups`."""
        return rational(x, self.numerator, self.denominator, form=self.form, dim=self.dim)

    def gain(self) -> float:
        """`1 / E[F(z)^2]` of the present coefficients for a standard normal `z`; see `rational_gain`."""
        return rational_gain(self.numerator, self.denominator, form=self.form)

    def extra_repr(self) -> str:
        """Options, for printing."""
        init = self.init if isinstance(self.init, str) else getattr(self.init, "__name__", repr(self.init))
        return f"num_groups={self.num_groups}, degree={self.degree}, init={init!r}, form={self.form!r}, dim={self.dim}"


class GRKAN(nn.Module):
    """Two-layer group-rational KAN, in the place of a transformer's MLP: `fc2(drop(act2(fc1(drop(act1(x))))))`.

    The activation comes before each linear map. `act1` starts as the identity, `act2` as `init`; the maps start
    variance-preserving, `N(0, gain(act) / fan_in)`.

    Args:
        in_features: Input size.
        hidden_features: Hidden size; `in_features` by default.
        out_features: Output size; `in_features` by default.
        num_groups: Groups of each activation; must divide `in_features` and `hidden_features`.
        init: Activation that `act2` starts as; see `initial_coefficients`.
        bias: Whether the linear maps have a bias.
        dropout: Dropout probability after each activation.

    Shape:
        `(..., in_features)` to `(..., out_features)`.

    Source: "Kolmogorov-Arnold Transformer", section 4. The released code overwrites this start by a truncated normal of standard
    deviation 0.02; this is the start that the paper derives.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        num_groups: int = 8,
        init: str | Function = "silu",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("in_features", in_features)
        hidden = in_features if hidden_features is None else checks.positive_int("hidden_features", hidden_features)
        out = in_features if out_features is None else checks.positive_int("out_features", out_features)
        checks.positive_int("num_groups", num_groups)
        for name, size in (("in_features", in_features), ("hidden_features", hidden)):
            if size % num_groups:
                raise ValueError(f"num_groups: must divide {name}, got num_groups={num_groups}, {name}={size}")
        self.act1 = GroupRational(num_groups=num_groups, init="identity", device=device, dtype=dtype)
        self.fc1 = nn.Linear(in_features, hidden, bias=bias, device=device, dtype=dtype)
        self.act2 = GroupRational(num_groups=num_groups, init=init, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)
        self.drop = nn.Dropout(checks.in_range("dropout", dropout, 0.0, 1.0))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Restart the activations, and draw the weights from `N(0, gain / fan_in)` with zero bias."""
        for act, fc in ((self.act1, self.fc1), (self.act2, self.fc2)):
            act.reset_parameters()
            nn.init.normal_(fc.weight, std=(_initial_gain(act) / fc.in_features) ** 0.5)
            if fc.bias is not None:
                nn.init.zeros_(fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        checks.last_dim("x", x, self.fc1.in_features)
        h: Tensor = self.fc1(self.drop(self.act1(x)))
        y: Tensor = self.fc2(self.drop(self.act2(h)))
        return y


def _initial_gain(act: GroupRational) -> float:
    # From the float64 start rather than the parameters, which may live on the meta device.
    return rational_gain(*initial_coefficients(act.init, degree=act.degree, form=act.form), form=act.form)
