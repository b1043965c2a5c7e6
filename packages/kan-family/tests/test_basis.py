import math
from collections.abc import Callable

import bases_oracle as oracle
import numpy as np
import pytest
import torch
from torch import Tensor

from phyla.kan_family import RBF, RSWAF, ActivationPair, Basis, BSpline, Chebyshev, Fourier, Jacobi, Rational, ReLUBump, Wavelet, functional
from phyla.kan_family.functional.basis import ACTIVATIONS, COMBINATIONS
from phyla.shared.testing import assert_close

SPECS: list[Basis] = [
    BSpline(),
    BSpline(4, 1),
    BSpline(6, 2, (-2.0, 1.0)),
    BSpline(20, 4),
    BSpline(5, 3, outside="linear"),
    BSpline(5, 1, outside="linear"),
    ReLUBump(),
    ReLUBump(power=1),
    ReLUBump(power=4),
    Fourier(),
    Fourier(1),
    Fourier(9),
    Chebyshev(),
    Chebyshev(squash="clamp"),
    Chebyshev(squash="none"),
    Jacobi(),
    Jacobi(5, 0.5, -0.5),
    RBF(),
    RBF(3, (-1.0, 1.0), width=0.3),
    RSWAF(inv_width=2.0),
    *(Wavelet(kind=kind) for kind in ("mexican_hat", "morlet", "dog")),
    *(ActivationPair(activation=name) for name in ACTIVATIONS),
    *(ActivationPair(combine=name) for name in COMBINATIONS),
]
SMOOTH = [
    spec
    for spec in SPECS
    if not (isinstance(spec, ReLUBump) and spec.power < 3)
    and not (isinstance(spec, BSpline) and spec.order < 3)
    and not (isinstance(spec, Chebyshev) and spec.squash == "clamp")
]


def curves(spec: Basis, basis: torch.nn.Module) -> oracle.Curves:
    """The oracle of a built basis."""

    def row(name: str, i: int) -> list[float]:
        values = getattr(basis, name).detach()
        return (values[i] if values.dim() == 2 else values).tolist()

    if isinstance(spec, BSpline):
        if spec.outside == "linear":
            return lambda x, i: continued(x, row("knots", i), spec.order)
        return lambda x, i: oracle.bspline(x, row("knots", i), spec.order)
    if isinstance(spec, ReLUBump):
        return lambda x, i: oracle.relu_bump(x, row("low", i), row("high", i), spec.constants()[1][0], spec.power)
    if isinstance(spec, Fourier):
        return lambda x, i: oracle.fourier(x, spec.num_frequencies)
    if isinstance(spec, Chebyshev):
        return lambda x, i: oracle.chebyshev(x, spec.degree, spec.squash)
    if isinstance(spec, Jacobi):
        return lambda x, i: oracle.jacobi(x, spec.degree, spec.alpha, spec.beta, spec.squash)
    if isinstance(spec, RBF):
        return lambda x, i: oracle.rbf(x, row("centers", i), spec.constants()[1][0])
    if isinstance(spec, RSWAF):
        return lambda x, i: oracle.rswaf(x, row("centers", i), spec.inv_width)
    if isinstance(spec, Wavelet):
        return lambda x, i: oracle.wavelet(x, row("translation", i), row("scale", i), spec.kind)
    assert isinstance(spec, ActivationPair)
    return lambda x, i: oracle.activation_pair(x, row("low", i), row("high", i), spec.activation, spec.combine)


def continued(x: float, t: list[float], order: int) -> list[float]:
    """Values and one-sided slopes at the end of the interior grid; the splines are polynomials there, so differences of them are exact
    enough."""
    low, high = t[order], t[-order - 1]
    if low <= x < high:
        return oracle.bspline(x, t, order)
    end, step = (low, 1e-6) if x < low else (high, -1e-6)
    at = [oracle.bspline(end + j * step + (step * 1e-6 if x >= high else 0), t, order) for j in range(3)]
    return [a + (x - end) * (-1.5 * a + 2 * b - 0.5 * c) / step for a, b, c in zip(*at, strict=True)]


def built(spec: Basis, inputs: int = 3, spread: float = 0.05) -> torch.nn.Module:
    """With parameters moved off their start, and uneven knots."""
    torch.manual_seed(0)
    basis = spec.build(inputs, dtype=torch.float64)
    with torch.no_grad():
        for value in basis.tensors():
            value.add_(spread * torch.randn_like(value))
        if isinstance(spec, BSpline):
            basis.knots.copy_(basis.knots.sort(-1).values)
    return basis


def points(count: int = 20, inputs: int = 3) -> Tensor:
    return torch.randn(count, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_are_the_equations(spec: Basis) -> None:
    basis, x = built(spec), points()
    tolerance = 1e-7 if isinstance(spec, BSpline) and spec.outside == "linear" else 1e-9
    assert_close(str(spec), basis(x), oracle.expand(x, curves(spec, basis)), tolerance)
    assert basis(x).shape == (20, 3, spec.num_basis)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_the_slopes(spec: Basis) -> None:
    basis = built(spec)
    x = points(2).requires_grad_()
    named = dict(basis.named_parameters())

    def of(x: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(basis, dict(zip(named, values, strict=True)), (x,))
        return out

    assert torch.autograd.gradcheck(of, (x, *named.values()))
    if spec in SMOOTH:
        assert torch.autograd.gradgradcheck(of, (x, *named.values()))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_out_inputs_are_finite(spec: Basis, dtype: torch.dtype) -> None:
    basis = spec.build(2, dtype=dtype)
    x = torch.tensor([[1e4, -1e4], [100.0, -100.0], [0.0, 12.0]], dtype=dtype, requires_grad=True)
    coef = torch.ones(1, 2, spec.num_basis, dtype=dtype)
    for y in (basis(x), basis.linear(x, coef, base_weight=torch.ones(1, 2, dtype=dtype))):
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert y.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_bsplines_sum_to_one_inside_the_grid_and_vanish_outside(order: int) -> None:
    basis = built(BSpline(7, order), spread=0.02)
    low, high = basis.knots[:, order], basis.knots[:, -order - 1]
    x = low + (high - low) * torch.linspace(0, 1 - 1e-9, 101, dtype=torch.float64)[:, None]
    assert_close("sum", basis(x).sum(-1), torch.ones_like(x), 1e-12)
    beyond = torch.stack([basis.knots[:, 0] - 1e-9, basis.knots[:, -1], basis.knots[:, -1] + 3])
    assert (basis(beyond) == 0).all()


def test_linear_continuation_keeps_the_sum_and_is_straight() -> None:
    basis = built(BSpline(5, 3, outside="linear"))
    x = torch.linspace(2, 9, 8, dtype=torch.float64)[:, None].expand(-1, 3)
    phi = basis(x)
    assert_close("sum", phi.sum(-1), torch.ones_like(x), 1e-12)
    assert phi.diff(n=2, dim=0).abs().max() < 1e-10


@pytest.mark.parametrize("order", [1, 2, 3])
def test_repeated_knots_never_give_nan(order: int) -> None:
    knots = torch.tensor([[0.0] * (order + 1) + [0.5] * (order + 2) + [1.0] * (order + 1)], dtype=torch.float64)
    x = torch.tensor([[0.0], [0.3], [0.5], [0.9], [1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    phi = functional.bspline_basis(x, knots, order)
    assert phi.isfinite().all()
    assert_close("sum", phi.detach()[:4].sum(-1), torch.ones(4, 1, dtype=torch.float64), 1e-12)
    coef = torch.randn(2, 1, phi.shape[-1], dtype=torch.float64)
    y = functional.bspline_linear(x, coef, knots, order)
    assert_close("linear", y.detach(), torch.einsum("bik,oik->bo", phi.detach(), coef), 1e-12)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_fourier_stays_accurate_at_high_frequencies_in_float32() -> None:
    x = torch.linspace(-30, 30, 2001)[:, None]
    exact = functional.fourier_basis(x.double(), 32)
    assert (functional.fourier_basis(x, 32) - exact).abs().max() < 5e-6
    eye = torch.eye(64).unsqueeze(1)
    assert (functional.fourier_linear(x, eye) - exact[:, 0]).abs().max() < 5e-6


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_low_precision_is_computed_in_float32(spec: Basis) -> None:
    basis, x = spec.build(4), torch.rand(6, 4)
    coef = torch.randn(3, 4, spec.num_basis)
    expected = basis.linear(x.bfloat16().float(), coef)
    low = basis.linear(x.bfloat16(), coef.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close("bfloat16", low.float(), expected, 6e-2)


def test_mean_square_is_the_variance_of_the_expansion() -> None:
    torch.manual_seed(0)
    z = torch.randn(200_000, 1, dtype=torch.float64)
    for spec in (Fourier(), Jacobi(), RBF(), ActivationPair(), Rational(num_groups=1)):
        sampled = spec.build(1, dtype=torch.float64)(z).square().sum(-1).mean().item()
        assert spec.mean_square() == pytest.approx(sampled, rel=0.02)


def test_mean_square_is_the_64_node_quadrature() -> None:
    # For B-splines the quadrature is not yet converged: its nodes are 0.25 apart, more than half a cell of the grid.
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    squares = BSpline().build(1, dtype=torch.float64)(torch.from_numpy(nodes)[:, None]).square().sum((1, 2))
    assert BSpline().mean_square() == pytest.approx(float(weights @ squares.numpy()) / np.sqrt(2 * np.pi), rel=1e-12)


def test_specs_are_values() -> None:
    assert Basis.parse("bspline") == BSpline()
    assert {BSpline(): 1}[BSpline(5, 3)] == 1
    assert BSpline(7) != BSpline()
    assert "grid_size=7" in repr(BSpline(7).build(2))
    for name in ("bspline", "relu", "fourier", "chebyshev", "jacobi", "rbf", "rswaf", "wavelet", "rational"):
        assert Basis.parse(name).build(8)(torch.zeros(2, 8)).shape == (2, 8, Basis.parse(name).num_basis)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Basis.parse("nope"), ValueError, "basis: expected a Basis or one of .*, got 'nope'"),
        (lambda: Basis.parse(3), TypeError, "basis: expected a Basis or one of .*, got int 3"),
        (lambda: BSpline(0), ValueError, "grid_size: expected a positive int, got 0"),
        (lambda: BSpline(order=0), ValueError, "order: expected a positive int, got 0"),
        (lambda: BSpline(grid_range=(1.0, 1.0)), ValueError, "grid_range: expected low < high"),
        (lambda: BSpline(outside="flat"), ValueError, "outside: expected one of 'zero', 'linear', got 'flat'"),
        (lambda: Jacobi(alpha=-1.0), ValueError, "alpha: expected a number in"),
        (lambda: RBF(width=0.0), ValueError, "width: expected a number in"),
        (lambda: Wavelet(kind="haar"), ValueError, "kind: expected one of"),
        (lambda: Rational(num_groups=3).build(8), ValueError, "num_groups: must divide in_features, got num_groups=3, in_features=8"),
        (lambda: functional.bspline_basis(torch.zeros(2, 3), torch.zeros(2, 9)), ValueError, "x: expected last dimension 2"),
        (lambda: functional.bspline_basis(torch.zeros(2, 3), torch.zeros(3, 4)), ValueError, "knots: expected at least order"),
        (lambda: functional.jacobi_basis(torch.zeros(2), 3, -2.0), ValueError, "alpha: expected a number in"),
        (lambda: functional.relu_bump_basis(torch.zeros(2), torch.zeros(4), torch.zeros(3), scale=1.0), ValueError, "high: expected shape"),
        (lambda: BSpline().build(3)(torch.zeros(2, 4)), ValueError, "x: expected last dimension 3"),
    ],
)
def test_errors_name_the_argument(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_initial_bumps_peak_at_one() -> None:
    spec = ReLUBump(5, 3)
    basis = spec.build(1)
    middle = (basis.low + basis.high).detach() / 2
    assert_close("peak", basis(middle.t()).detach()[:, 0].diagonal(), torch.ones(spec.num_basis), 1e-6)
    assert math.isclose(spec.width, 0.8)
