import copy
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import sympy
import torch
from torch import Tensor

from phyla.kan_family.bases import BSpline
from phyla.kan_family.model import KAN
from phyla.kan_family.symbolic import SymbolicFit, fit_edge, symbolic_readout

GOLDEN = Path(__file__).parent / "golden"
X = torch.linspace(-1, 1, 200, dtype=torch.float64)

# name, curve, a and b that the canonical form must have (None: not unique)
CURVES: list[tuple[str, Callable[[Tensor], Tensor], float | None, float | None]] = [
    ("x", lambda x: 2 * x + 1, 1.0, 0.0),
    ("x^2", lambda x: 3 * (2 * x - 0.5) ** 2 - 1, 1.0, -0.25),
    ("x^3", lambda x: 0.5 * (-2 * x + 0.5) ** 3, 1.0, -0.25),
    ("x^4", lambda x: (x + 0.3) ** 4, 1.0, 0.3),
    ("x^5", lambda x: -((x - 0.2) ** 5) + 4, 1.0, -0.2),
    ("1/x", lambda x: 2 / (3 * x + 6), 1.0, 2.0),
    ("1/x^2", lambda x: (2 - x) ** -2, 1.0, -2.0),
    ("sqrt", lambda x: torch.sqrt(5 - 4 * x), -1.0, 1.25),
    ("1/sqrt", lambda x: 1 / torch.sqrt(2 * x + 3), 1.0, 1.5),
    ("exp", lambda x: 0.1 * torch.exp(-3 * x + 2) - 5, -3.0, 0.0),
    ("log", lambda x: torch.log(4 * x + 6), 1.0, 1.5),
    ("sin", lambda x: -2 * torch.sin(4 * x + 1), 4.0, 1 - math.pi),
    ("cos", lambda x: torch.cos(-2.5 * x + 0.3), 2.5, -0.3),
    ("abs", lambda x: (3 * x - 0.9).abs(), 1.0, -0.3),
    ("tan", lambda x: torch.tan(-1.1 * x + 0.2 + math.pi), 1.1, -0.2),
    ("tanh", lambda x: -1.7 * torch.tanh(2.2 * x - 0.4) + 0.3, 2.2, -0.4),
    ("sgn", lambda x: torch.sign(x - 0.4), 1.0, None),
    ("gaussian", lambda x: 3 * torch.exp(-((-2 * x - 0.3) ** 2)), 2.0, 0.3),
    ("arcsin", lambda x: torch.arcsin(-0.7 * x + 0.2), 0.7, -0.2),
    ("arccos", lambda x: torch.arccos(-0.7 * x + 0.2), 0.7, -0.2),
    ("arctan", lambda x: torch.arctan(5 * x + 1), 5.0, 1.0),
    ("arctanh", lambda x: torch.arctanh(0.9 * x - 0.05), 0.9, -0.05),
]


@pytest.mark.parametrize(("name", "curve", "a", "b"), CURVES, ids=[curve[0] for curve in CURVES])
def test_recovers_every_function_in_canonical_form(name: str, curve: Callable[[Tensor], Tensor], a: float | None, b: float | None) -> None:
    y = curve(X)
    fits = fit_edge(X, y)
    found = next(fit for fit in fits if fit.name == name)
    assert fits[0].r2 == found.r2 > 1 - 1e-9
    torch.testing.assert_close(found(X), y, atol=1e-6, rtol=1e-6)
    if a is not None:
        assert found.a == pytest.approx(a, abs=1e-6)
    if b is not None:
        assert found.b == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "y", "a", "c"), [("sin", 5 * torch.sin(3 * X + 2) + 0.7, 3, 5), ("tanh", -1.7 * torch.tanh(2.2 * X - 0.4) + 0.3, 2.2, 1.7)]
)
def test_acceptance_curves(name: str, y: Tensor, a: float, c: float) -> None:
    best = fit_edge(X, y)[0]
    assert best.name == name
    assert 1 - best.r2 < 1e-9
    assert abs(best.a) == pytest.approx(a, abs=1e-4)
    assert abs(best.c) == pytest.approx(c, abs=1e-3)


def test_at_least_as_good_as_pykan() -> None:
    with np.load(GOLDEN / "pykan_symbolic_sin.npz") as golden:
        x, y = torch.from_numpy(golden["x"]), torch.from_numpy(golden["y"])
        best = fit_edge(x, y)[0]
        assert best.name == str(golden["function"])
        assert best.r2 >= float(golden["pykan_r2"])
        assert (best.a, best.b, best.c, best.d) == pytest.approx(golden["true_abcd"], abs=1e-6)


def test_order_and_library() -> None:
    y = torch.sin(2 * X)
    fits = fit_edge(X, y)
    assert fits == sorted(fits, key=lambda fit: (-fit.r2, fit.complexity))
    assert len(fits) == 23
    assert [fit.name for fit in fits[:2]] == ["sin", "cos"]
    assert [fit.name for fit in fit_edge(X, y, library=["cos", "x"])] == ["cos", "x"]
    assert fit_edge(X, y, library=["0"])[0] == SymbolicFit("0", 1.0, 0.0, 0.0, pytest.approx(0.0), 0.0, 0)  # type: ignore[arg-type]
    assert fits == fit_edge(X, y)


def test_a_line_is_read_as_a_line_wherever_it_lies() -> None:
    for x in (X, 1e-3 * X, 1e3 * X, 1e6 + X):
        best = fit_edge(x, 2 * x - 1)[0]
        assert (best.name, best.complexity) == ("x", 1)
        assert best.c == pytest.approx(2)


@pytest.mark.parametrize(
    ("x", "curve", "name"),
    [
        (25 * X + 25, lambda x: torch.sin(0.3 * x), "sin"),
        (0.01 * X, lambda x: torch.tanh(300 * x), "tanh"),
        (5 * X + 1000, lambda x: torch.exp(x - 1000), "exp"),
        (100 * X + 300, torch.sqrt, "sqrt"),
    ],
)
def test_other_scales_of_x(x: Tensor, curve: Callable[[Tensor], Tensor], name: str) -> None:
    y = curve(x)
    best = fit_edge(x, y)[0]
    assert best.name == name
    torch.testing.assert_close(best(x), y, atol=1e-5 * float(y.abs().max()), rtol=0)


def test_ranges_reach_high_frequencies() -> None:
    best = fit_edge(X, torch.sin(47 * X + 0.5), library=["sin"], a_range=(40.0, 60.0))[0]
    assert best.a == pytest.approx(47)
    assert best.b == pytest.approx(0.5)


def test_constants_and_tiny_samples() -> None:
    for x, y in ((X, torch.full_like(X, 3.0)), (X[:1], X[:1]), (X.float(), torch.full((200,), 0.1))):
        (only,) = fit_edge(x, y)
        assert (only.name, only.c, only.r2) == ("0", 0.0, 1.0)
        assert only.d == pytest.approx(float(y[0]))
    assert [fit.name for fit in fit_edge(torch.ones(5), torch.arange(5.0))] == ["0"]
    for samples in (2, 3, 4, 5):
        x = torch.linspace(0, 1, samples)
        fits = fit_edge(x, x.square() + 1)
        assert fits[0].r2 == 1.0
        assert all(fit(x).isfinite().all() for fit in fits)


def test_every_fit_is_finite_on_the_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 20 * torch.randn(300, generator=generator)
    y = torch.randn(300, generator=generator)
    fits = fit_edge(x, y)
    assert {fit.name for fit in fits} >= {"0", "x", "sin", "log", "sqrt", "arcsin"}
    assert all(fit(x.double()).isfinite().all() and 0 <= fit.r2 <= 1 for fit in fits)


def test_float32_samples() -> None:
    x = X.float()
    best = fit_edge(x, torch.exp(x))[0]
    assert best.name == "exp"
    assert best.a == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.tensor([0.0, float("nan")])}, ValueError, "x: expected finite values, got 1"),
        ({"y": torch.tensor([0.0, float("inf")])}, ValueError, "y: expected finite values, got 1"),
        ({"x": torch.zeros(2, 1)}, ValueError, r"x: expected shape \(samples,\) .*got shape \(2, 1\)"),
        ({"x": torch.zeros(0)}, ValueError, r"x: expected shape \(samples,\) with at least one sample, got shape \(0,\)"),
        ({"y": torch.zeros(3)}, ValueError, r"y: expected shape \(2,\) like x, got shape \(3,\)"),
        ({"x": [0.0, 1.0]}, TypeError, "x: expected a Tensor, got list"),
        ({"library": ["sine"]}, ValueError, "library: .*did you mean 'sin'"),
        ({"a_range": (1.0, -1.0)}, ValueError, "a_range: expected"),
        ({"b_range": (0.0, float("inf"))}, ValueError, "b_range: expected"),
    ],
)
def test_fit_edge_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.tensor([0.0, 1.0]), "y": torch.tensor([0.0, 1.0])} | options
    with pytest.raises(error, match=message):
        fit_edge(**arguments)  # type: ignore[arg-type]


def _drawn(widths: list[int], curves: list[list[list[Callable[[Tensor], Tensor]]]], x: Tensor) -> KAN:
    """A KAN whose edges are the given curves, each fitted by least squares on what reaches its layer."""
    model = KAN(widths, basis=BSpline(30, 3), dtype=torch.float64)
    model.update_grid(x, eps=1.0, margin=0.1)
    h = x
    with torch.no_grad():
        for layer, rows in zip(model.layers, curves, strict=True):
            layer.update_grid(h, eps=1.0, margin=0.1)
            layer.base_weight.zero_()
            phi = layer.basis(h)
            for o, row in enumerate(rows):
                for i, curve in enumerate(row):
                    layer.coef[o, i] = torch.linalg.lstsq(phi[:, i], curve(h[:, i : i + 1]), driver="gelsd").solution[:, 0]
            h = layer(h)
    return model


def _square_points(samples: int = 400) -> Tensor:
    return 2 * torch.rand(samples, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1


@pytest.fixture(scope="module")
def exp_sin_square() -> tuple[KAN, Tensor]:
    x = _square_points()
    model = _drawn([2, 1, 1], [[[lambda u: 0.5 * torch.sin(math.pi * u), lambda u: 0.5 * u**2 - 0.1]], [[lambda u: torch.exp(2 * u)]]], x)
    return model, x


def _evaluate(formula: str, x: Tensor) -> Tensor:
    names = [f"x{i + 1}" for i in range(x.shape[1])]
    function = sympy.lambdify(names, sympy.sympify(formula), "numpy")
    return torch.from_numpy(np.broadcast_to(function(*x.T.numpy()), len(x)).copy())


def test_readout_finds_the_formula(exp_sin_square: tuple[KAN, Tensor]) -> None:
    model, x = exp_sin_square
    before = copy.deepcopy(model.state_dict())
    readout = symbolic_readout(model, x)
    assert [[fit.name for row in layer for fit in row if fit] for layer in readout.fits] == [["sin", "x^2"], ["exp"]]
    assert readout.r2.shape == (1,)
    assert readout.r2[0] > 0.9999
    torch.testing.assert_close(_evaluate(readout.formulas[0], x), readout(x)[:, 0], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_readout_evaluates_any_shape_and_is_differentiable(exp_sin_square: tuple[KAN, Tensor]) -> None:
    model, x = exp_sin_square
    readout = symbolic_readout(model, x, library=["x", "x^2", "sin", "exp"])
    assert readout(x[0]).shape == (1,)
    assert readout(x[:6].reshape(2, 3, 2)).shape == (2, 3, 1)
    assert readout(x[:0]).shape == (0, 1)
    assert readout(x[:2].float()).dtype == torch.float32
    point = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(readout(point).sum(), point)
    value = math.exp(math.sin(0.3 * math.pi) + 0.16 - 0.2)
    torch.testing.assert_close(
        gradient, torch.tensor([value * math.pi * math.cos(0.3 * math.pi), -0.8 * value], dtype=torch.float64), rtol=1e-2, atol=1e-2
    )
    with pytest.raises(ValueError, match="x: expected last dimension 2"):
        readout(x[:, :1])


def test_numerical_edges_keep_their_curves(exp_sin_square: tuple[KAN, Tensor]) -> None:
    model, x = exp_sin_square
    readout = symbolic_readout(model, x, library=["x"], r2_threshold=1.0)
    assert all(fit is None for layer in readout.fits for row in layer for fit in row)
    assert "?" in readout.formulas[0]
    torch.testing.assert_close(readout(x), model(x).detach())
    assert readout.r2[0] == pytest.approx(1)


def test_masked_edges_vanish_and_biases_appear() -> None:
    x = _square_points(100)
    model = KAN([2, 2], basis=BSpline(8, 3), dtype=torch.float64)
    layer = model.layers[0]
    with torch.no_grad():
        layer.coef.zero_()
        layer.base_weight.zero_()
        layer.bias.copy_(torch.tensor([0.5, -1.25]))
        layer.coef[0, 0] = torch.linalg.lstsq(layer.basis(x)[:, 0], 3 * x[:, :1], driver="gelsd").solution[:, 0]
    readout = symbolic_readout(model, x)
    assert readout.formulas == ("3*x1 + 0.5", "-1.25")
    assert [fit.name if fit else None for fit in readout.fits[0][0]] == ["x", "0"]
    torch.testing.assert_close(readout.r2, torch.ones(2, dtype=torch.float64))


def test_simplicity_trades_complexity_for_accuracy(exp_sin_square: tuple[KAN, Tensor]) -> None:
    model, x = exp_sin_square
    simple = symbolic_readout(model, x, simplicity=1.0, r2_threshold=0.5)
    exact = symbolic_readout(model, x, simplicity=0.0)
    complexity = [sum(fit.complexity for layer in readout.fits for row in layer for fit in row if fit) for readout in (simple, exact)]
    assert complexity[0] < complexity[1]
    assert simple.r2[0] < exact.r2[0]


@pytest.mark.parametrize("name", [curve[0] for curve in CURVES] + ["0"])
def test_formulas_are_read_by_sympy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _square_points(50)
    model = KAN([2, 1], basis=BSpline(5, 3), dtype=torch.float64)
    reading = SymbolicFit(name, -0.31, 0.45, -1.5e-5 if name == "x" else -1.5, 0.25, 1.0, 1)
    monkeypatch.setattr("phyla.kan_family.symbolic.fit_edge", lambda *_, **__: [reading])
    readout = symbolic_readout(model, x)
    torch.testing.assert_close(_evaluate(readout.formulas[0], x), readout(x)[:, 0], rtol=1e-6, atol=1e-6)


def test_progress(exp_sin_square: tuple[KAN, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    model, x = exp_sin_square
    symbolic_readout(model, x, library=["x"])
    assert capsys.readouterr().err == ""
    symbolic_readout(model, x, library=["x"], progress=True)
    assert "3/3" in capsys.readouterr().err


def test_readout_errors() -> None:
    x = _square_points(10)
    model = KAN([2, 1], basis=BSpline(5, 3), dtype=torch.float64)
    with pytest.raises(TypeError, match="model: expected a KAN, got Linear"):
        symbolic_readout(torch.nn.Linear(2, 1), x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model: .*norm='layer'"):
        symbolic_readout(KAN([2, 1], norm="layer"), x)
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 2\), got shape \(10,\)"):
        symbolic_readout(model, x[:, 0])
    with pytest.raises(ValueError, match="simplicity: expected a number"):
        symbolic_readout(model, x, simplicity=1.5)
    with pytest.raises(ValueError, match="r2_threshold: expected a number"):
        symbolic_readout(model, x, r2_threshold=1.5)


def test_a_parabola_is_not_read_as_a_wide_sine() -> None:
    x = _square_points(200)
    generator = torch.Generator().manual_seed(1)
    noise = 1e-5 * torch.randn(200, dtype=torch.float64, generator=generator)
    wide = [fit for fit in fit_edge(x[:, 0], x[:, 0] ** 2 + noise) if fit.name in ("sin", "x^2")]
    assert max(wide, key=lambda fit: fit.r2).r2 - min(wide, key=lambda fit: fit.r2).r2 < 1e-8
    model = _drawn([2, 1], [[[lambda u: u**2, lambda u: 0.5 * u**2 + 1e-5 * u**3]]], x)
    readout = symbolic_readout(model, x)
    assert [fit.name for fit in readout.fits[0][0] if fit] == ["x^2", "x^2"]


def test_a_readout_draws_its_functions() -> None:
    matplotlib.use("Agg")
    x = _square_points(200)
    model = _drawn([2, 1, 1], [[[lambda u: u**2, lambda u: 0 * u]], [[torch.exp]]], x)
    ax = symbolic_readout(model, x).plot()
    assert [text.get_text() for text in ax.texts] == ["x^2", "exp"]
    assert ax.get_title() == "r2 of the outputs: 1.0000"
