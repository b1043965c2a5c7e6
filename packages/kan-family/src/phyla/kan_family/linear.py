"""The Kolmogorov-Arnold linear layer: a learnable univariate function on every edge, sums on the nodes, for any basis.

Legend: B samples, I inputs, O outputs, K basis functions of an input, k spline order, G grid intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from phyla.kan_family import grid
from phyla.kan_family.bases import Basis, BasisFunction, BSpline, Device
from phyla.kan_family.functional.basis import BASES, activate
from phyla.shared import checks

Base = str | Callable[[Tensor], Tensor] | None
Norm = Literal["layer", "batch"] | None

_TILE_ELEMENTS = 1 << 20


class KANLinear(nn.Module):
    """`y_o = sum_i [ w_oi b(x_i) + sum_k c_oik B_k(x_i) ] + bias_o`.

    The start preserves variance for every basis: `coef ~ N(0, init_scale^2 / (I m2))` with `m2 = sum_k E[B_k(z)^2]` for a standard
    normal z, `base_weight` as in `nn.Linear`, `bias = 0`.

    Args:
        in_features: I.
        out_features: O.
        basis: the functions B_k: a Basis, or its name.
        base: the function b of the base branch, `"silu"`, `"gelu"`, `"relu"`, `"tanh"`, `"identity"` or a callable; None for no such
            branch.
        bias: whether to add a bias.
        norm: normalisation, `"layer"` or `"batch"`, of the input of the basis branch; the base branch sees the raw input.
        init_scale: standard deviation that the basis branch gives to the output; 1 without base branch, else 0.1.

    Shape:
        `(..., I)` to `(..., O)`.

    Attributes:
        coef: `(O, I, K)`.
        base_weight: `(O, I)` or None.
        bias: `(O,)` or None.
        basis: the `BasisFunction`.
        edge_mask: `(O, I)` or None; multiplies `coef` and `base_weight`; set by `KAN.prune`.

    Source: "KAN: Kolmogorov-Arnold Networks", equations 2.5 and 2.10; the layout of the normalisation is FastKAN's.
    """

    edge_mask: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        basis: Basis | str = "bspline",
        base: Base = "silu",
        bias: bool = True,
        norm: Norm = None,
        init_scale: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checks.positive_int("in_features", in_features)
        self.out_features = checks.positive_int("out_features", out_features)
        self.base = check_base(base)
        self.init_scale = default_scale(base, init_scale)
        spec = Basis.parse(basis)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.basis: BasisFunction = spec.build(in_features, **options)
        self.coef = nn.Parameter(torch.empty(out_features, in_features, spec.num_basis, **options))
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features, **options)) if base is not None else None
        self.bias = nn.Parameter(torch.empty(out_features, **options)) if bias else None
        self.norm = _norm(norm, in_features, options)
        self.register_buffer("edge_mask", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, and set basis and normalisation to their start; the edge mask stays."""
        self.basis.reset_parameters()
        init_weights(self.coef, self.base_weight, self.bias, self.basis.spec, self.init_scale, self.in_features)
        if isinstance(self.norm, nn.LayerNorm | nn.BatchNorm1d):
            self.norm.reset_parameters()

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """`coef` and `base_weight` with masked edges set to zero."""
        if self.edge_mask is None:
            return self.coef, self.base_weight
        base_weight = None if self.base_weight is None else self.base_weight * self.edge_mask
        return self.coef * self.edge_mask.unsqueeze(-1), base_weight

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., I)` to `(..., O)`."""
        checks.last_dim("x", x, self.in_features)
        coef, base_weight = self.weights()
        if base_weight is None:
            return self.basis.linear(self._normalised(x), coef, bias=self.bias)
        if self.norm is None and isinstance(self.base, str):
            return self.basis.linear(x, coef, base_weight=base_weight, base=self.base, bias=self.bias)
        return self.basis.linear(self._normalised(x), coef) + F.linear(self._base(x), base_weight, self.bias)

    def _base(self, x: Tensor) -> Tensor:
        return activate(x, self.base) if isinstance(self.base, str) else self.base(x) if self.base is not None else x

    def _normalised(self, x: Tensor) -> Tensor:
        """The input of the basis branch."""
        if self.norm is None:
            return x
        normalised: Tensor = (
            self.norm(x.reshape(-1, self.in_features)).reshape(x.shape) if isinstance(self.norm, nn.BatchNorm1d) else self.norm(x)
        )
        return normalised

    def _spline(self, name: str) -> BSpline:
        if not isinstance(self.basis.spec, BSpline):
            raise TypeError(f"{name}: expected a BSpline basis, got {self.basis.spec}")
        return self.basis.spec

    @torch.no_grad()
    def update_grid(self, x: Tensor, *, eps: float = 0.02, margin: float = 0.0) -> None:
        """Move the knots to where the samples are and refit the coefficients, in place: the outputs on the samples stay.

        An input whose samples are all equal keeps its knots. Never fails on rank-deficient data.

        Args:
            x: samples `(..., I)`.
            eps: 1 for equally spaced knots, 0 for quantiles of the samples.
            margin: how far the equally spaced grid reaches beyond the samples.

        Raises:
            TypeError: If the basis is not a BSpline.
            ValueError: If `x` has no sample or is not finite.

        Source: "KAN: Kolmogorov-Arnold Networks", section 2.4, and pykan.
        """
        spec = self._spline("update_grid")
        checks.in_range("eps", eps, 0.0, 1.0)
        checks.in_range("margin", margin, 0.0)
        samples = self._samples(x, 1)
        checks.finite("x", samples)
        knots = self.basis.get_buffer("knots")
        old, samples = knots.double(), samples.double()
        new = grid.adapted(old, samples, spec.order, eps, margin).to(knots.dtype)
        coef = self.weights()[0]
        self.coef.copy_(grid.refit(samples, coef.double(), old, new.double(), spec.order, spec.outside))
        knots.copy_(new)

    @torch.no_grad()
    def refine(self, grid_size: int) -> None:
        """Cut the interior grid into `grid_size` intervals and refit without data; lossless where the old size divides the new one.

        `coef` is replaced by a new Parameter: build optimizers anew.

        Raises:
            TypeError: If the basis is not a BSpline.

        Source: "KAN: Kolmogorov-Arnold Networks", section 2.5.
        """
        spec = self._spline("refine")
        checks.positive_int("grid_size", grid_size)
        knots = self.basis.get_buffer("knots")
        new = grid.refined(knots.double(), spec.order, grid_size).to(knots.dtype)
        samples = grid.probes(new.double(), spec.order)
        coef = grid.refit(samples, self.coef.double(), knots.double(), new.double(), spec.order, spec.outside)
        self._resize(grid_size)
        self.basis.get_buffer("knots").copy_(new)
        self.coef.copy_(coef)

    def _resize(self, grid_size: int) -> None:
        """Room for another number of grid intervals; values are to be filled in."""
        spec = replace(self._spline("grid_size"), grid_size=grid_size)
        options: dict[str, Any] = {"device": self.coef.device, "dtype": self.coef.dtype}
        self.basis = spec.build(self.in_features, device=self.coef.device, dtype=self.basis.get_buffer("knots").dtype).train(self.training)
        empty = torch.empty(self.out_features, self.in_features, spec.num_basis, **options)
        self.coef = nn.Parameter(empty, requires_grad=self.coef.requires_grad)

    def edge_outputs(self, x: Tensor) -> Tensor:
        """The curves themselves, `phi_oi(x_i)`: `(..., I)` to `(..., O, I)`. A diagnostic that materialises them."""
        checks.last_dim("x", x, self.in_features)
        coef, base_weight = self.weights()
        curves = torch.einsum("...ik,oik->...oi", self.basis(self._normalised(x)), coef)
        return curves if base_weight is None else curves + self._base(x).unsqueeze(-2) * base_weight

    def edge_std(self, x: Tensor, *, unbiased: bool = True) -> Tensor:
        """Standard deviation of every edge's output over the samples, exact at the price of a GEMM and differentiable.

        With `f_i` the centred basis values of input i and the base value, `std_oi^2 = [c_oi, w_oi] cov(f_i) [c_oi, w_oi]^T`.

        Args:
            x: samples `(..., I)`.
            unbiased: divide by B - 1, else by B.

        Returns:
            `(O, I)`.

        Raises:
            ValueError: If there are fewer than 2 samples (1 if not unbiased).
        """
        samples = self._samples(x, 1 + unbiased)
        coef, base_weight = self.weights()
        weight = coef if base_weight is None else torch.cat([coef, base_weight.unsqueeze(-1)], -1)
        count = len(samples)
        normalised = self._normalised(samples)
        pairs = list(zip(self._tiles(normalised), self._tiles(samples), strict=True))
        mean = torch.stack([self._recomputed(_total, *pair) for pair in pairs]).sum(0) / count
        covariance = torch.stack([self._recomputed(_scatter, *pair, mean) for pair in pairs]).sum(0) / (count - unbiased)
        variance = torch.einsum("oik,ikl,oil->oi", weight, covariance, weight)
        positive = variance > 0
        return torch.where(positive, torch.where(positive, variance, 1).sqrt(), 0)

    def coverage(self, x: Tensor) -> Tensor:
        """Share of the samples `(..., I)` of each input inside the interior grid, `(I,)`; 1 for other bases than B-splines."""
        samples = self._normalised(self._samples(x, 1))
        if not isinstance(self.basis.spec, BSpline):
            return samples.new_ones(self.in_features)
        knots, order = self.basis.get_buffer("knots"), self.basis.spec.order
        low, high = knots[:, order], knots[:, -order - 1]
        return ((samples >= low) & (samples < high)).to(samples.dtype).mean(0)

    def _samples(self, x: Tensor, least: int) -> Tensor:
        samples = checks.last_dim("x", x, self.in_features).reshape(-1, self.in_features)
        if len(samples) < least:
            raise ValueError(f"x: expected at least {least} sample{'s'[: least - 1]}, got shape {tuple(x.shape)}")
        return samples

    def _tiles(self, samples: Tensor) -> Iterator[Tensor]:
        yield from torch.split(samples, max(1, _TILE_ELEMENTS // (self.in_features * (self.basis.num_basis + 1))))

    def _recomputed(self, reduce: Callable[..., Tensor], normalised: Tensor, raw: Tensor, *rest: Tensor) -> Tensor:
        """A reduction of a tile of basis values that does not keep them for backward."""

        def values(normalised: Tensor, raw: Tensor, *rest: Tensor) -> Tensor:
            phi = self.basis(normalised)
            if self.base_weight is not None:
                phi = torch.cat([phi, self._base(raw).unsqueeze(-1)], -1)
            return reduce(phi, *rest)

        result: Tensor = checkpoint(values, normalised, raw, *rest, use_reentrant=False)
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        coef, mask = state_dict.get(f"{prefix}coef"), state_dict.get(f"{prefix}edge_mask")
        if isinstance(coef, Tensor) and coef.dim() == 3:
            if coef.shape[:2] != self.coef.shape[:2]:
                expected = (self.out_features, self.in_features)
                raise ValueError(
                    f"state_dict: expected {prefix}coef with (out_features, in_features) = {expected}, got {tuple(coef.shape[:2])}"
                )
            if coef.shape != self.coef.shape and isinstance(self.basis.spec, BSpline):
                self._resize(coef.shape[2] - self.basis.spec.order)
            self.edge_mask = None if mask is None else torch.ones_like(self.coef[..., 0], requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"in_features={self.in_features}, out_features={self.out_features}, base={self.base!r}, bias={self.bias is not None}"


def _total(phi: Tensor) -> Tensor:
    """Sums over the samples of `phi (B, I, K)`."""
    return phi.sum(0)


def _scatter(phi: Tensor, mean: Tensor) -> Tensor:
    """`(I, K, K)`: products of the centred functions, summed over the samples of `phi (B, I, K)`."""
    centred = (phi - mean).transpose(0, 1)
    return centred.mT @ centred


def check_base(base: Base) -> Base:
    """A base function: one of the names, a callable or None."""
    if base is None or callable(base):
        return base
    return checks.choice("base", base, BASES)


def default_scale(base: Base, init_scale: float | None) -> float:
    """The basis branch carries the signal alone, or starts as a small perturbation of the base branch."""
    return (1.0 if base is None else 0.1) if init_scale is None else checks.in_range("init_scale", init_scale, 0.0)


@torch.no_grad()
def init_weights(coef: Tensor, base_weight: Tensor | None, bias: Tensor | None, spec: Basis, scale: float, fan_in: int) -> None:
    """Variance-preserving start of a layer of any form; draws `coef`, then `base_weight`."""
    nn.init.normal_(coef, std=scale / math.sqrt(fan_in * spec.mean_square()))
    if base_weight is not None:
        nn.init.kaiming_uniform_(base_weight, a=math.sqrt(5))
    if bias is not None:
        nn.init.zeros_(bias)


def _norm(norm: Norm, features: int, options: dict[str, Any]) -> nn.Module | None:
    if norm is None:
        return None
    checks.choice("norm", norm, ("layer", "batch"))
    return nn.LayerNorm(features, **options) if norm == "layer" else nn.BatchNorm1d(features, **options)
