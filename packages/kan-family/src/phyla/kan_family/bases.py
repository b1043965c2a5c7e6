"""Bases as small value objects. The same object can be plugged into a linear layer, a convolution or an attention operator.

A `Basis` says which functions; `basis.build(in_features)` makes the `BasisFunction` module that holds their knots, centres or ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from phyla.kan_family.basis_function import BasisFunction as BasisFunction
from phyla.kan_family.basis_function import Device as Device
from phyla.kan_family.basis_function import RationalFunction
from phyla.kan_family.functional import basis as formulas
from phyla.kan_family.functional.basis import Activation, Combine, Outside, WaveletKind
from phyla.kan_family.functional.rational import Form
from phyla.kan_family.rational import Function, initial_coefficients
from phyla.shared import checks

Squash = Literal["tanh", "clamp", "none"]
Range = tuple[float, float]


def _check_range(name: str, value: Range) -> None:
    low, high = value
    checks.in_range(f"{name}[0]", low)
    checks.in_range(f"{name}[1]", high)
    if not low < high:
        raise ValueError(f"{name}: expected low < high, got {value}")


def _spaced(low: float, high: float, count: int) -> Tensor:
    if count == 1:
        low = high = (low + high) / 2
    return torch.linspace(low, high, count, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Basis:
    """Which functions a layer's edges are sums of; hashable, comparable, reusable in any number of layers."""

    family: ClassVar[str]

    @property
    def num_basis(self) -> int:
        """Number K of basis functions of an input."""
        raise NotImplementedError

    def build(self, in_features: int, *, device: Device = None, dtype: torch.dtype | None = None) -> BasisFunction:
        """The module that holds this basis for `in_features` inputs."""
        return BasisFunction(self, in_features, device=device, dtype=dtype)

    @staticmethod
    def parse(value: Basis | str) -> Basis:
        """A basis from itself, or by name with its defaults.

        Raises:
            TypeError: If `value` is neither a Basis nor a str.
            ValueError: If the name is unknown.
        """
        if isinstance(value, Basis):
            return value
        expected = f"basis: expected a Basis or one of {list(_NAMED)}, got "
        if not isinstance(value, str):
            raise TypeError(expected + f"{type(value).__name__} {value!r}")
        if value not in _NAMED:
            raise ValueError(expected + repr(value))
        return _NAMED[value]()

    def mean_square(self) -> float:
        """`sum_k E[B_k(z)^2]` for a standard normal z at the initial parameters, by 64-node Gauss-Hermite quadrature."""
        return _mean_square(self)

    def initial_values(self, in_features: int) -> dict[str, Tensor]:
        """Initial values (float64) of what the module stores, by name, in the order of the op's arguments."""
        del in_features
        return {}

    @property
    def learned(self) -> bool:
        """Whether the stored tensors are parameters; else they are buffers."""
        return bool(getattr(self, "trainable", False))

    def constants(self) -> tuple[list[int], list[float]]:
        """The `ints` and `floats` of `functional.basis.evaluate`."""
        return [], []


class _OnGrid(Basis):
    """A basis on a grid of intervals, each function spanning `order + 1` of them."""

    grid_size: int
    order: int

    @property
    def num_basis(self) -> int:
        """`grid_size + order`."""
        return self.grid_size + self.order


@dataclass(frozen=True)
class BSpline(_OnGrid):
    """B-splines of an order on a grid of `grid_size` intervals; each input has its own knots, which can follow the data.

    Args:
        grid_size: intervals G of the interior grid.
        order: polynomial degree k of the pieces, at least 1.
        grid_range: ends of the interior grid.
        outside: `"zero"`, or `"linear"` to continue along the tangent at the ends of the interior grid.

    Source: "KAN: Kolmogorov-Arnold Networks", section 2.2.
    """

    family: ClassVar[str] = "bspline"
    grid_size: int = 5
    order: int = 3
    grid_range: Range = (-1.0, 1.0)
    outside: Outside = "zero"

    def __post_init__(self) -> None:
        checks.positive_int("grid_size", self.grid_size)
        checks.positive_int("order", self.order)
        _check_range("grid_range", self.grid_range)
        checks.choice("outside", self.outside, ("zero", "linear"))

    def initial_values(self, in_features: int) -> dict[str, Tensor]:
        """`knots (I, G + 2 k + 1)`."""
        low, high = self.grid_range
        step = (high - low) / self.grid_size
        steps = torch.arange(-self.order, self.grid_size + self.order + 1, dtype=torch.float64, device="cpu")
        return {"knots": (low + steps * step).repeat(in_features, 1)}

    def constants(self) -> tuple[list[int], list[float]]:
        """Order and the way to continue."""
        return [self.order, int(self.outside == "linear")], []


@dataclass(frozen=True)
class ReLUBump(_OnGrid):
    """Products of two ReLUs with learnable ends.

    Args:
        grid_size: intervals G of the grid.
        order: how many further intervals a bump spans; there are G + order bumps.
        power: 2 in ReLU-KAN; more makes the bumps smoother.
        grid_range: where inputs are expected.
        trainable: whether the ends learn.

    Source: "ReLU-KAN", section 3.
    """

    family: ClassVar[str] = "relu_bump"
    grid_size: int = 5
    order: int = 3
    power: int = 2
    grid_range: Range = (0.0, 1.0)
    trainable: bool = True

    def __post_init__(self) -> None:
        checks.positive_int("grid_size", self.grid_size)
        checks.positive_int("order", self.order)
        checks.positive_int("power", self.power)
        _check_range("grid_range", self.grid_range)

    @property
    def width(self) -> float:
        """Initial width of a bump."""
        return (self.order + 1) * (self.grid_range[1] - self.grid_range[0]) / self.grid_size

    def initial_values(self, in_features: int) -> dict[str, Tensor]:
        """`low (I, G + k)` and `high (I, G + k)`."""
        low = _bump_starts(self.grid_size, self.order, self.grid_range).repeat(in_features, 1)
        return {"low": low, "high": low + self.width}

    def constants(self) -> tuple[list[int], list[float]]:
        """The power, and the scale that makes the initial peaks 1 (it stays when the ends learn, as in the authors' code)."""
        return [self.power], [4 / self.width**2]


def _bump_starts(grid_size: int, order: int, grid_range: Range) -> Tensor:
    low, high = grid_range
    return low + torch.arange(-order, grid_size, dtype=torch.float64, device="cpu") * ((high - low) / grid_size)


@dataclass(frozen=True)
class ActivationPair(_OnGrid):
    """Two facing activations, combined; the intervals are shared by all inputs.

    Args:
        grid_size: intervals G of the grid.
        order: how many further intervals a pair spans; there are G + order pairs.
        activation: the function of both halves.
        combine: how the halves are combined; see `functional.activation_pair_basis`.
        grid_range: where inputs are expected.
        trainable: whether the ends learn.

    Source: "AF-KAN", section 3.
    """

    family: ClassVar[str] = "activation_pair"
    grid_size: int = 3
    order: int = 3
    activation: Activation = "silu"
    combine: Combine = "quad1"
    grid_range: Range = (0.0, 1.0)
    trainable: bool = True

    def __post_init__(self) -> None:
        checks.positive_int("grid_size", self.grid_size)
        checks.positive_int("order", self.order)
        checks.choice("activation", self.activation, formulas.ACTIVATIONS)
        checks.choice("combine", self.combine, formulas.COMBINATIONS)
        _check_range("grid_range", self.grid_range)

    def initial_values(self, in_features: int) -> dict[str, Tensor]:
        """`low (G + k,)` and `high (G + k,)`."""
        del in_features
        low = _bump_starts(self.grid_size, self.order, self.grid_range)
        return {"low": low, "high": low + (self.order + 1) * (self.grid_range[1] - self.grid_range[0]) / self.grid_size}

    def constants(self) -> tuple[list[int], list[float]]:
        """Indices of activation and combination."""
        return [formulas.ACTIVATIONS.index(self.activation), formulas.COMBINATIONS.index(self.combine)], []


@dataclass(frozen=True)
class Fourier(Basis):
    """`[cos x .. cos Gx, sin x .. sin Gx]`; the constant is the layer's bias.

    Args:
        num_frequencies: G.
    """

    family: ClassVar[str] = "fourier"
    num_frequencies: int = 5

    def __post_init__(self) -> None:
        checks.positive_int("num_frequencies", self.num_frequencies)

    @property
    def num_basis(self) -> int:
        """`2 num_frequencies`."""
        return 2 * self.num_frequencies

    def constants(self) -> tuple[list[int], list[float]]:
        """The number of frequencies."""
        return [self.num_frequencies], []


@dataclass(frozen=True)
class Chebyshev(Basis):
    """Chebyshev polynomials `T_0 .. T_degree` of the squashed input.

    Args:
        degree: the highest degree, at least 1.
        squash: how inputs are brought into [-1, 1]: `"tanh"`, `"clamp"` or `"none"`.
    """

    family: ClassVar[str] = "chebyshev"
    degree: int = 4
    squash: Squash = "tanh"

    def __post_init__(self) -> None:
        checks.positive_int("degree", self.degree)
        checks.choice("squash", self.squash, formulas.SQUASHES)

    @property
    def num_basis(self) -> int:
        """`degree + 1`."""
        return self.degree + 1

    def constants(self) -> tuple[list[int], list[float]]:
        """Degree and index of the squash."""
        return [self.degree, formulas.SQUASHES.index(self.squash)], []


@dataclass(frozen=True)
class Jacobi(Basis):
    """Jacobi polynomials `P_0 .. P_degree` of the squashed input; Legendre is `alpha = beta = 0`.

    Args:
        degree: the highest degree, at least 1.
        alpha: above -1.
        beta: above -1.
        squash: how inputs are brought into [-1, 1]: `"tanh"`, `"clamp"` or `"none"`.
    """

    family: ClassVar[str] = "jacobi"
    degree: int = 4
    alpha: float = 1.0
    beta: float = 1.0
    squash: Squash = "tanh"

    def __post_init__(self) -> None:
        checks.positive_int("degree", self.degree)
        checks.in_range("alpha", self.alpha, -1.0, low_open=True)
        checks.in_range("beta", self.beta, -1.0, low_open=True)
        checks.choice("squash", self.squash, formulas.SQUASHES)

    @property
    def num_basis(self) -> int:
        """`degree + 1`."""
        return self.degree + 1

    def constants(self) -> tuple[list[int], list[float]]:
        """Degree, index of the squash; alpha, beta."""
        return [self.degree, formulas.SQUASHES.index(self.squash)], [self.alpha, self.beta]


@dataclass(frozen=True)
class RBF(Basis):
    """Gaussian bumps `exp(-((x - c) / width)^2)` at equally spaced centres.

    Args:
        num_centers: number of centres.
        grid_range: first and last centre.
        width: the spacing of the centres by default.

    Source: "Kolmogorov-Arnold Networks are Radial Basis Function Networks".
    """

    family: ClassVar[str] = "rbf"
    num_centers: int = 8
    grid_range: Range = (-2.0, 2.0)
    width: float | None = None

    def __post_init__(self) -> None:
        checks.positive_int("num_centers", self.num_centers)
        _check_range("grid_range", self.grid_range)
        if self.width is not None:
            checks.in_range("width", self.width, 0.0, low_open=True)

    @property
    def num_basis(self) -> int:
        """`num_centers`."""
        return self.num_centers

    def initial_values(self, in_features: int) -> dict[str, Tensor]:
        """`centers (n,)`."""
        del in_features
        return {"centers": _spaced(*self.grid_range, self.num_centers)}

    def constants(self) -> tuple[list[int], list[float]]:
        """The inverse width."""
        low, high = self.grid_range
        return [], [1 / self.width if self.width is not None else max(1, self.num_centers - 1) / (high - low)]


@dataclass(frozen=True)
class RSWAF(Basis):
    """Reflectional switch functions `1 - tanh^2((x - c) inv_width)` at equally spaced centres.

    Args:
        num_centers: number of centres.
        grid_range: first and last centre.
        inv_width: inverse width, positive.
    """

    family: ClassVar[str] = "rswaf"
    num_centers: int = 8
    grid_range: Range = (-1.2, 0.2)
    inv_width: float = 1.0

    def __post_init__(self) -> None:
        checks.positive_int("num_centers", self.num_centers)
        _check_range("grid_range", self.grid_range)
        checks.in_range("inv_width", self.inv_width, 0.0, low_open=True)

    @property
    def num_basis(self) -> int:
        """`num_centers`."""
        return self.num_centers

    def initial_values(self, in_features: int) -> dict[str, Tensor]:
        """`centers (n,)`."""
        del in_features
        return {"centers": _spaced(*self.grid_range, self.num_centers)}

    def constants(self) -> tuple[list[int], list[float]]:
        """The inverse width."""
        return [], [self.inv_width]


@dataclass(frozen=True)
class Wavelet(Basis):
    """Wavelets with learnable translations and scales.

    Args:
        num_wavelets: wavelets of each input.
        kind: the mother wavelet, `"mexican_hat"`, `"morlet"` or `"dog"`; see `functional.wavelet_basis`.
        grid_range: first and last initial translation.
        trainable: whether translations and scales learn.

    Source: "Wav-KAN: Wavelet Kolmogorov-Arnold Networks".
    """

    family: ClassVar[str] = "wavelet"
    num_wavelets: int = 4
    kind: WaveletKind = "mexican_hat"
    grid_range: Range = (-1.0, 1.0)
    trainable: bool = True

    def __post_init__(self) -> None:
        checks.positive_int("num_wavelets", self.num_wavelets)
        checks.choice("kind", self.kind, formulas.WAVELETS)
        _check_range("grid_range", self.grid_range)

    @property
    def num_basis(self) -> int:
        """`num_wavelets`."""
        return self.num_wavelets

    def initial_values(self, in_features: int) -> dict[str, Tensor]:
        """`translation (I, n)`, and `scale (I, n)`, at first the spacing of the translations."""
        low, high = self.grid_range
        translation = _spaced(low, high, self.num_wavelets).repeat(in_features, 1)
        scale = (high - low) / (self.num_wavelets - 1) if self.num_wavelets > 1 else 1.0
        return {"translation": translation, "scale": torch.full_like(translation, scale)}

    def constants(self) -> tuple[list[int], list[float]]:
        """Index of the mother wavelet."""
        return [formulas.WAVELETS.index(self.kind)], []


@dataclass(frozen=True)
class Rational(Basis):
    """One safe rational function for each group of inputs: the group-rational KAN.

    Args:
        num_groups: groups of consecutive inputs.
        degree: degrees of numerator and denominator.
        init: activation that the function starts as; see `GroupRational`.
        form: `"sum_abs"` or `"abs_sum"`; see `functional.rational`.
        shared_numerator: one numerator for all groups.

    Source: "Kolmogorov-Arnold Transformer", section 4.
    """

    family: ClassVar[str] = "rational"
    num_groups: int = 8
    degree: tuple[int, int] = (5, 4)
    init: str | Function = "silu"
    form: Form = "sum_abs"
    shared_numerator: bool = True

    def __post_init__(self) -> None:
        checks.positive_int("num_groups", self.num_groups)
        checks.positive_int("degree[0]", self.degree[0])
        checks.positive_int("degree[1]", self.degree[1])
        checks.choice("form", self.form, ("sum_abs", "abs_sum"))

    @property
    def num_basis(self) -> int:
        """1."""
        return 1

    @property
    def learned(self) -> bool:
        """Always."""
        return True

    def build(self, in_features: int, *, device: Device = None, dtype: torch.dtype | None = None) -> BasisFunction:
        """The module that holds the coefficients; `num_groups` must divide `in_features`."""
        return RationalFunction(self, in_features, device=device, dtype=dtype)

    def initial_values(self, in_features: int) -> dict[str, Tensor]:
        """`numerator (1 or g, m + 1)` and `denominator (g, n)`."""
        del in_features
        numerator, denominator = initial_coefficients(self.init, degree=self.degree, form=self.form)
        return {
            "numerator": numerator.repeat(1 if self.shared_numerator else self.num_groups, 1),
            "denominator": denominator.repeat(self.num_groups, 1),
        }


_NAMED: dict[str, type[Basis]] = {
    "bspline": BSpline,
    "relu": ReLUBump,
    "fourier": Fourier,
    "chebyshev": Chebyshev,
    "jacobi": Jacobi,
    "rbf": RBF,
    "rswaf": RSWAF,
    "wavelet": Wavelet,
    "rational": Rational,
}


@lru_cache(maxsize=256)
def _mean_square(basis: Basis) -> float:
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(64))
    function = (replace(basis, num_groups=1) if isinstance(basis, Rational) else basis).build(1, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        squares: Tensor = function(nodes[:, None])[:, 0].square().sum(-1)
    return float((weights * squares).sum() / weights.sum())
