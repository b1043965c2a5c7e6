"""Reading formulas off the edges of a KAN: `y ~ c f(a x + b) + d`.

For a given `(a, b)` the best `(c, d)` solve a two-column linear problem (variable projection), so that the search for a function
is two-dimensional: a coarse scan over `(a, b)`, then a least-squares polish of the best cells. Two pairs `(a, b)` are the same
answer when `f(a x + b)` spans the same curves up to `c` and `d`; each function lists these invariances, and one canonical pair
is reported.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from phyla.kan_family.linear import KANLinear
from phyla.kan_family.model import KAN
from phyla.kan_family.plots import network
from phyla.shared import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SymbolicFit", "SymbolicReadout", "fit_edge", "symbolic_readout"]

_Array = NDArray[np.float64]
_SCAN_SAMPLES, _SCAN_CELLS, _POLISHED_CELLS, _POLISH_STEPS = 64, 41, 3, 60


@dataclass(frozen=True)
class _Function:
    """One entry of the library; `value(xp, u)` takes numpy or torch as `xp`, whose names for these functions are the same."""

    complexity: int
    value: Callable[[Any, Any], Any]
    slope: Callable[[_Array], Any]
    text: str
    # What leaves the span of {f(a x + b), 1} unchanged:
    flip: bool = False  # (a, b) -> (-a, -b)
    scale: bool = False  # (a, b) -> (s a, s b), s > 0
    shift: bool = False  # b -> anything
    period: float = math.inf  # b -> b + period
    twin: tuple[str, float] | None = None  # f(u + offset) = +-f_twin(u) + constant

    @property
    def parameters(self) -> int:
        """How many of `a` and `b` change the span."""
        return 2 - self.scale - self.shift


_LIBRARY: dict[str, _Function] = {
    "0": _Function(0, lambda xp, u: 0 * u, np.zeros_like, "0"),
    "x": _Function(1, lambda xp, u: u, np.ones_like, "{}", flip=True, scale=True, shift=True),
    "x^2": _Function(2, lambda xp, u: u**2, lambda u: 2 * u, "{}**2", flip=True, scale=True),
    "x^3": _Function(3, lambda xp, u: u**3, lambda u: 3 * u**2, "{}**3", flip=True, scale=True),
    "x^4": _Function(3, lambda xp, u: u**4, lambda u: 4 * u**3, "{}**4", flip=True, scale=True),
    "x^5": _Function(3, lambda xp, u: u**5, lambda u: 5 * u**4, "{}**5", flip=True, scale=True),
    "1/x": _Function(2, lambda xp, u: 1 / u, lambda u: -(u**-2), "1/{}", flip=True, scale=True),
    "1/x^2": _Function(2, lambda xp, u: u**-2, lambda u: -2 * u**-3, "1/{}**2", flip=True, scale=True),
    "sqrt": _Function(2, lambda xp, u: xp.sqrt(u), lambda u: 0.5 * u**-0.5, "sqrt({})", scale=True),
    "1/sqrt": _Function(2, lambda xp, u: 1 / xp.sqrt(u), lambda u: -0.5 * u**-1.5, "1/sqrt({})", scale=True),
    "exp": _Function(2, lambda xp, u: xp.exp(u), np.exp, "exp({})", shift=True),
    "log": _Function(2, lambda xp, u: xp.log(u), lambda u: 1 / u, "log({})", scale=True),
    "sin": _Function(2, lambda xp, u: xp.sin(u), np.cos, "sin({})", flip=True, period=math.pi),
    "cos": _Function(2, lambda xp, u: xp.cos(u), lambda u: -np.sin(u), "cos({})", flip=True, period=math.pi, twin=("sin", -math.pi / 2)),
    "abs": _Function(3, lambda xp, u: xp.abs(u), np.sign, "abs({})", flip=True, scale=True),
    "tan": _Function(3, lambda xp, u: xp.tan(u), lambda u: np.cos(u) ** -2, "tan({})", flip=True, period=math.pi),
    "tanh": _Function(3, lambda xp, u: xp.tanh(u), lambda u: 1 - np.tanh(u) ** 2, "tanh({})", flip=True),
    "sgn": _Function(3, lambda xp, u: xp.sign(u), np.zeros_like, "sign({})", flip=True, scale=True),
    "gaussian": _Function(3, lambda xp, u: xp.exp(-(u**2)), lambda u: -2 * u * np.exp(-(u**2)), "exp(-{}**2)", flip=True),
    "arcsin": _Function(4, lambda xp, u: xp.arcsin(u), lambda u: (1 - u**2) ** -0.5, "asin({})", flip=True),
    "arccos": _Function(4, lambda xp, u: xp.arccos(u), lambda u: -((1 - u**2) ** -0.5), "acos({})", flip=True, twin=("arcsin", 0.0)),
    "arctan": _Function(4, lambda xp, u: xp.arctan(u), lambda u: 1 / (1 + u**2), "atan({})", flip=True),
    "arctanh": _Function(4, lambda xp, u: xp.arctanh(u), lambda u: 1 / (1 - u**2), "atanh({})", flip=True),
}


@dataclass(frozen=True)
class SymbolicFit:
    """One reading of a curve, `y ~ c f(a x + b) + d`.

    Attributes:
        name: The function `f`, a name of the library.
        a: Inner scale.
        b: Inner shift.
        c: Outer scale.
        d: Outer shift.
        r2: Coefficient of determination on the samples, rounded to 12 decimals.
        complexity: The function's complexity in the library.
    """

    name: str
    a: float
    b: float
    c: float
    d: float
    r2: float
    complexity: int

    def __call__(self, x: Tensor) -> Tensor:
        """`c f(a x + b) + d`, elementwise."""
        value: Tensor = self.c * _LIBRARY[self.name].value(torch, self.a * x + self.b) + self.d
        return value


@dataclass(frozen=True)
class _Curve:
    """Samples of an edge with their target centred and scaled to norm 1."""

    x: _Array
    middle: float  # of the interval that x covers
    half: float  # its half-width
    target: _Array
    mean: float
    norm: float

    @classmethod
    def of(cls, x: _Array, y: _Array) -> _Curve:
        low, high = float(x.min()), float(x.max())
        mean = float(y.mean())
        norm = float(np.linalg.norm(y - mean))
        return cls(x, (low + high) / 2, (high - low) / 2, (y - mean) / (norm or 1.0), mean, norm)

    def project(self, f: _Array, flat: float = 1e-4) -> tuple[_Array, _Array, _Array]:
        """Centred values, best scale and share of the target explained for curves `f (..., samples)`.

        NaN where a curve varies by less than `flat` of its mean: there `c` and `d` would be huge and cancel, so that any smooth
        function looks like its tangent or its parabola.
        """
        mean = f.mean(-1, keepdims=True)
        centred = f - mean
        square = np.square(centred).sum(-1)
        inner = np.where(square <= flat**2 * f.shape[-1] * np.square(mean[..., 0]), np.nan, centred @ self.target)
        return centred, inner / square, inner * inner / square


@dataclass(frozen=True)
class _Scan:
    """The coarse grid of `(a, b)` and its arguments `a x + b` on samples spread evenly over the sorted ones."""

    cells: _Array  # (cells, 2)
    arguments: _Array  # (cells, samples)
    curve: _Curve

    @classmethod
    def of(cls, curve: _Curve, a: _Array, b: _Array) -> _Scan:
        cells = np.stack(np.meshgrid(a, b, indexing="ij"), axis=-1).reshape(-1, 2)
        middle, half = curve.middle, curve.half
        if half > 0 and not (0.5 <= half <= 2 and abs(middle) <= 1):  # the grid suits [-1, 1]: scan x brought there, too
            cells = np.concatenate([cells, np.stack([cells[:, 0] / half, cells[:, 1] - cells[:, 0] * middle / half], axis=1)])
        order = np.argsort(curve.x, kind="stable")
        few = order[np.unique(np.linspace(0, order.size - 1, min(order.size, _SCAN_SAMPLES)).round().astype(np.intp))]
        return cls(cells, cells[:, :1] * curve.x[few] + cells[:, 1:], _Curve.of(curve.x[few], curve.target[few]))

    def best(self, function: _Function) -> _Array:
        """The best finite cells `(at most 3, 2)`."""
        explained = self.curve.project(function.value(np, self.arguments))[2]
        best = np.argsort(np.where(np.isfinite(explained), -explained, np.inf), kind="stable")[:_POLISHED_CELLS]
        return self.cells[best[np.isfinite(explained[best])]]


def _polish(function: _Function, curve: _Curve, ab: _Array) -> tuple[float, float] | None:
    """Levenberg-Marquardt over `(a, b)` from all starts `(cells, 2)` at once; the best pair, None if no start is finite.

    The residual is that of the best `(c, d)`; its derivative leaves out that of the projector along the residual (Kaufman), which
    vanishes at a good fit. A step to a non-finite residual is refused like one that does not improve. The search runs in
    `x` brought to [-1, 1], where both parameters have one scale.
    """
    middle, half = curve.middle, curve.half or 1.0
    t = (curve.x - middle) / half

    def evaluate(ab: _Array) -> tuple[_Array, _Array, _Array]:
        u = ab[:, :1] * t + ab[:, 1:]
        centred, c, _ = curve.project(function.value(np, u))
        residual = curve.target - c[:, None] * centred
        slope = c[:, None] * function.slope(u)
        columns = np.stack([slope * t, slope], axis=2)
        columns = np.where(np.isfinite(columns), columns, 0.0)  # sqrt, arcsin, .. at the end of their domain
        columns -= columns.mean(1, keepdims=True)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        columns -= unit[:, :, None] * (unit[:, None, :] @ columns)
        columns_T = columns.transpose(0, 2, 1)
        return np.square(residual).sum(1), columns_T @ columns, (columns_T @ residual[:, :, None])[:, :, 0]

    ab = np.stack([ab[:, 0] * half, ab[:, 1] + ab[:, 0] * middle], axis=1)
    error, normal, gradient = evaluate(ab)
    ab, error, normal, gradient = (part[np.isfinite(error)] for part in (ab, error, normal, gradient))
    damping = np.full(len(ab), 1e-3)
    active = np.full(len(ab), True)
    for _ in range(_POLISH_STEPS):
        if not active.any():
            break
        ridge = 1e-10 * (normal[:, 0, 0] + normal[:, 1, 1])  # for functions with one parameter too many, like exp
        p, q, r = normal[:, 0, 0] * (1 + damping) + ridge, normal[:, 0, 1], normal[:, 1, 1] * (1 + damping) + ridge
        step = np.stack([r * gradient[:, 0] - q * gradient[:, 1], p * gradient[:, 1] - q * gradient[:, 0]], axis=1)
        trial = ab + step / (p * r - q * q)[:, None]
        new_error, new_normal, new_gradient = evaluate(trial)
        better = new_error < error
        settled = better & (error - new_error <= 1e-11 * error) | (error < 1e-26) | (damping > 1e8)
        ab = np.where(better[:, None], trial, ab)
        normal = np.where(better[:, None, None], new_normal, normal)
        gradient = np.where(better[:, None], new_gradient, gradient)
        error = np.where(better, new_error, error)
        damping = np.where(better, damping / 10, damping * 10)
        active &= ~settled
    if not len(ab):
        return None
    a, b = ab[int(np.argmin(error))]
    return float(a / half), float(b - a * middle / half)


def _canonical(function: _Function, a: float, b: float) -> tuple[float, float]:
    if function.flip and a < 0:
        a, b = -a, -b
    if function.scale:
        a, b = math.copysign(1.0, a), b / abs(a)
    if function.shift:
        b = 0.0
    if math.isfinite(function.period):
        b -= function.period * math.ceil(b / function.period - 0.5)  # in (-period/2, period/2]
    return a, b


def _reading(name: str, curve: _Curve, ab: tuple[float, float]) -> SymbolicFit | None:
    """The fit for a pair `(a, b)`, or None if it is not finite."""
    function, (a, b) = _LIBRARY[name], ab
    f = function.value(np, a * curve.x + b)
    centred, c, _ = curve.project(f, flat=1e-12)
    r2 = 1 - np.square(curve.target - c * centred).sum()
    scale = float(c) * curve.norm
    shift = curve.mean - scale * float(f.mean())
    if not (np.isfinite(r2) and math.isfinite(scale) and math.isfinite(shift)):
        return None
    if name in ("sin", "cos") and scale < 0:  # half a turn makes the amplitude positive
        scale, b = -scale, b + (math.pi if b <= 0 else -math.pi)
    return SymbolicFit(name, a, b + 0.0, scale, shift, round(float(r2), 12), function.complexity)


def _samples(name: str, values: Tensor) -> _Array:
    checks.finite(name, checks.floating(name, values))
    if values.dim() != 1 or values.numel() == 0:
        raise ValueError(f"{name}: expected shape (samples,) with at least one sample, got shape {tuple(values.shape)}")
    return values.detach().to("cpu", torch.float64).numpy()


def _grid(name: str, ends: tuple[float, float]) -> _Array:
    low, high = (checks.in_range(name, end) for end in ends)
    if low > high:
        raise ValueError(f"{name}: expected (low, high) with low <= high, got {ends}")
    return np.linspace(low, high, _SCAN_CELLS)


def fit_edge(
    x: Tensor,
    y: Tensor,
    *,
    library: Sequence[str] | None = None,
    a_range: tuple[float, float] = (-10.0, 10.0),
    b_range: tuple[float, float] = (-10.0, 10.0),
) -> list[SymbolicFit]:
    """Fit `y ~ c f(a x + b) + d` for every function of the library.

    Each fit is in canonical form: `a = 1` and `b = 0` for `x`; `a = 1` for powers, `abs` and `sgn`; `a = 1` or `-1` for `sqrt`,
    `1/sqrt` and `log`; `b = 0` for `exp`; `a > 0` where `f` is odd or even (or `arccos`); `c > 0` and `b` in `(-pi, pi]` for
    `sin` and `cos`; `b` in `(-pi/2, pi/2]` for `tan`. The result is deterministic.

    Args:
        x: `(samples,)`.
        y: `(samples,)`.
        library: Names of functions; None means all: `0 x x^2 x^3 x^4 x^5 1/x 1/x^2 sqrt 1/sqrt exp log sin cos abs tan tanh sgn
            gaussian arcsin arccos arctan arctanh`.
        a_range: Interval of `a` that the coarse scan covers; the polish may leave it.
        b_range: Interval of `b` likewise.

    Returns:
        The fits, best `r2` first, ties by complexity. Functions that are not finite on the samples for any `(a, b)` that was
        looked at are left out. A constant curve has one fit, `0`.

    Raises:
        ValueError: If a sample is not finite, the shapes are wrong, or a name is not in the library.
        TypeError: If `x` or `y` is not a floating-point Tensor.

    Source: "KAN: Kolmogorov-Arnold Networks", section 2.5.1 (the affine search); variable projection in place of its grid zoom.
    """
    sample_x, sample_y = _samples("x", x), _samples("y", y)
    if sample_x.shape != sample_y.shape:
        raise ValueError(f"y: expected shape {tuple(x.shape)} like x, got shape {tuple(y.shape)}")
    names = tuple(_LIBRARY) if library is None else tuple(checks.choice("library", name, _LIBRARY) for name in library)
    a, b = _grid("a_range", a_range), _grid("b_range", b_range)

    curve = _Curve.of(sample_x, sample_y)
    if curve.norm <= 8 * torch.finfo(y.dtype).eps * np.linalg.norm(sample_y):
        return [SymbolicFit("0", 1.0, 0.0, 0.0, curve.mean, 1.0, 0)]
    fits = [SymbolicFit("0", 1.0, 0.0, 0.0, curve.mean, 0.0, 0)] if "0" in names else []
    found: dict[str, tuple[float, float] | None] = {"0": None, "x": (1.0, 0.0)}
    with np.errstate(all="ignore"):
        scan = _Scan.of(curve, a, b)
        for name in names:
            function = _LIBRARY[name]
            key, offset = function.twin or (name, 0.0)
            if key not in found:
                found[key] = _polish(_LIBRARY[key], curve, scan.best(_LIBRARY[key]))
            pair = found[key]
            if pair is not None:
                pair = (pair[0], pair[1] + offset)
                # The canonical form of exp may overflow far from the origin.
                fit = _reading(name, curve, _canonical(function, *pair)) or _reading(name, curve, pair)
                fits += [fit] if fit else []
    return sorted(fits, key=lambda fit: (-fit.r2, fit.complexity))


@dataclass(frozen=True, eq=False)
class SymbolicReadout:
    """A KAN read as formulas; call it to evaluate them.

    Attributes:
        fits: `fits[layer][out][in]`; None is an edge that no function fits well enough, which keeps its numerical curve.
        formulas: One formula an output, in the variables `x1, x2, ..`, as `sympy.sympify` reads it; `?` stands for a numerical edge.
        r2: `(outputs,)`, coefficient of determination of the symbolic model against the KAN, on the samples of the readout.
    """

    fits: tuple[tuple[tuple[SymbolicFit | None, ...], ...], ...]
    formulas: tuple[str, ...]
    r2: Tensor
    _model: KAN = field(repr=False)

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the symbolic model in float64, numerical edges by their curve: `(..., inputs) -> (..., outputs)`."""
        h = checks.last_dim("x", x, len(self.fits[0][0])).double()
        for layer, fits in zip(_layers(self._model), self.fits, strict=True):
            h = _evaluate(layer, fits, h)
        return h.to(x.dtype)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The network with the function of every edge ("?": numerical), into `ax` or new axes; needs matplotlib (extra `plot`).

        Edges that the readout found constant are left out.
        """
        names = [[["?" if fit is None else fit.name for fit in row] for row in layer] for layer in self.fits]
        drawn = [torch.tensor([[float(fit is None or fit.a * fit.c != 0) for fit in row] for row in layer]) for layer in self.fits]
        plot = network(ax, drawn, names)
        plot.set_title(f"r2 of the outputs: {', '.join(f'{r2:.4f}' for r2 in self.r2.tolist())}")
        return plot


def _layers(model: KAN) -> list[KANLinear]:
    return [layer for layer in model.layers if isinstance(layer, KANLinear)]


def _evaluate(layer: KANLinear, fits: Sequence[Sequence[SymbolicFit | None]], h: Tensor) -> Tensor:
    """One layer of the symbolic model: `(..., I) -> (..., O)`."""
    curves = layer.edge_outputs(h.to(layer.coef.dtype)).to(h) if any(None in row for row in fits) else h.new_empty(0)
    nodes = [[curves[..., o, i] if fit is None else fit(h[..., i]) for i, fit in enumerate(row)] for o, row in enumerate(fits)]
    out = torch.stack([torch.stack(node, -1).sum(-1) for node in nodes], -1)
    return out if layer.bias is None else out + layer.bias


def _number(value: float) -> str:
    return f"{value:.8g}"


def _affine(terms: Iterable[str], offset: float) -> str:
    parts = [*terms, *([_number(offset)] if offset != 0 else [])]
    return " + ".join(parts).replace("+ -", "- ") if parts else "0"


def _scaled(factor: float, text: str) -> str:
    return {1.0: text, -1.0: f"-{text}"}.get(factor, f"{_number(factor)}*{text}")


def _atom(text: str) -> str:
    return text if text.isalnum() else f"({text})"


def _edge_text(fit: SymbolicFit, variable: str) -> str:
    """`c f(a x + b)` as text; the outer shift is left to the node."""
    argument = _affine([_scaled(fit.a, _atom(variable))], fit.b)
    template = _LIBRARY[fit.name].text
    body = template.format(argument if "({})" in template else _atom(argument))
    return _scaled(fit.c, body)


def _formulas(model: KAN, fits: Sequence[Sequence[Sequence[SymbolicFit | None]]]) -> tuple[str, ...]:
    nodes = [f"x{i + 1}" for i in range(len(fits[0][0]))]
    for layer, layer_fits in zip(_layers(model), fits, strict=True):
        bias = [0.0] * len(layer_fits) if layer.bias is None else layer.bias.tolist()
        nodes = [
            _affine(
                ("?" if fit is None else _edge_text(fit, node) for fit, node in zip(row, nodes, strict=True) if fit is None or fit.c != 0),
                offset + sum(fit.d for fit in row if fit is not None),
            )
            for row, offset in zip(layer_fits, bias, strict=True)
        ]
    return tuple(nodes)


def _choose(fits: Sequence[SymbolicFit], simplicity: float) -> SymbolicFit | None:
    def error(fit: SymbolicFit) -> float:
        return 1 + 1e-5 - fit.r2

    best = min(fits, key=lambda fit: simplicity * fit.complexity + (1 - simplicity) * math.log2(error(fit)), default=None)
    if best is None:
        return None
    equals = [fit for fit in fits if fit.complexity <= best.complexity and error(fit) <= 1.1 * error(best)]
    return min(equals, key=lambda fit: _LIBRARY[fit.name].parameters)


def symbolic_readout(
    model: KAN,
    x: Tensor,
    *,
    library: Sequence[str] | None = None,
    simplicity: float = 0.8,
    r2_threshold: float = 0.9,
    progress: bool = False,
) -> SymbolicReadout:
    """Read every edge of a KAN as a function of the library and write one formula an output.

    Among the functions that reach `r2_threshold` on an edge, the one with the smallest
    `simplicity * complexity + (1 - simplicity) * log2(1 + 1e-5 - r2)` is taken; an edge that none reaches keeps its numerical curve.
    Where two of one complexity have errors within 10 %, the one with fewer inner parameters is taken: `sin` can imitate `x^2`.
    Layers are read in order, each on the outputs of the symbolic layers before it, so that every function is finite where it is used.

    Args:
        model: A KAN whose edges are functions of one variable; prune it first if it has many edges.
        x: `(samples, inputs)`.
        library: As in `fit_edge`.
        simplicity: Weight of complexity against accuracy, in `[0, 1]`.
        r2_threshold: Smallest `r2` of an edge that may become symbolic.
        progress: Show a progress bar over the edges.

    Returns:
        The fits, the formulas and the accuracy of the whole. The model is copied, not changed.

    Raises:
        ValueError: If `x` has the wrong shape or is not finite, an option is out of range, or the model has layer norms.
        TypeError: If `model` is not a KAN.

    Source: "KAN 2.0", section 3.3 and pykan's `auto_symbolic` (the choice criterion).
    """
    if not isinstance(model, KAN):
        raise TypeError(f"model: expected a KAN, got {type(model).__name__}")
    if any(isinstance(layer.norm, nn.LayerNorm) for layer in _layers(model)):
        raise ValueError("model: expected edges that are functions of one variable, got a KAN with norm='layer'")
    checks.finite("x", checks.shape("x", checks.floating("x", x), (None, model.widths[0])))
    checks.in_range("simplicity", simplicity, 0.0, 1.0)
    checks.in_range("r2_threshold", r2_threshold, high=1.0)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    layers = _layers(frozen)

    fits = []
    h = x.detach().double()
    edges = sum(layer.out_features * layer.in_features for layer in layers)
    with torch.no_grad(), tqdm(total=edges, disable=not progress, desc="symbolic_readout") as bar:
        for layer in layers:
            h_layer = h.to(layer.coef.dtype)
            curves = layer.edge_outputs(h_layer)
            rows: list[list[SymbolicFit | None]] = [[] for _ in range(layer.out_features)]
            for o, i in product(range(layer.out_features), range(layer.in_features)):
                fits_edge = fit_edge(h_layer[:, i], curves[:, o, i], library=library)
                rows[o].append(_choose([fit for fit in fits_edge if fit.r2 >= r2_threshold], simplicity))
                bar.update()
            fits.append(tuple(tuple(row) for row in rows))
            h = _evaluate(layer, fits[-1], h)
        exact = frozen(x.to(layers[0].coef.dtype)).double()
        unexplained = (h - exact).square().sum(0)
        total = (exact - exact.mean(0)).square().sum(0)
        r2 = torch.where(total > 0, 1 - unexplained / total, (unexplained == 0).double())
    return SymbolicReadout(tuple(fits), _formulas(frozen, fits), r2, frozen)
