"""Kolmogorov-Arnold convolutions in 1, 2 and 3 dimensions: a learnable function on every tap, for any basis.

Legend: N samples, C input channels, O output channels, K basis functions of a channel, g groups.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from phyla.kan_family.bases import Basis, BasisFunction, Device, Rational
from phyla.kan_family.functional.basis import activate
from phyla.kan_family.functional.conv import basis_conv, convolve, pad
from phyla.kan_family.linear import Base, check_base, default_scale, init_weights
from phyla.shared import checks

Size = int | tuple[int, ...]


class _KANConv(nn.Module):
    """What the three dimensions share; see `KANConv2d`."""

    dimensions: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        basis: Basis | str = "bspline",
        base: Base = "silu",
        bias: bool = True,
        pad: Literal["input", "features"] = "input",
        init_scale: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = checks.positive_int("in_channels", in_channels)
        self.out_channels = checks.positive_int("out_channels", out_channels)
        self.groups = checks.positive_int("groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"groups: must divide {name}, got groups={groups}, {name}={channels}")
        self.kernel_size = self._sizes("kernel_size", kernel_size, 1)
        self.stride = self._sizes("stride", stride, 1)
        self.padding = self._sizes("padding", padding, 0)
        self.dilation = self._sizes("dilation", dilation, 1)
        self.base = check_base(base)
        self.pad = checks.choice("pad", pad, ("input", "features"))
        self.init_scale = default_scale(base, init_scale)
        spec = Basis.parse(basis)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.basis: BasisFunction = spec.build(in_channels, **options)
        inputs = in_channels // groups
        self.coef = nn.Parameter(torch.empty(out_channels, inputs, spec.num_basis, *self.kernel_size, **options))
        self.base_weight = nn.Parameter(torch.empty(out_channels, inputs, *self.kernel_size, **options)) if base is not None else None
        self.bias = nn.Parameter(torch.empty(out_channels, **options)) if bias else None
        self.reset_parameters()

    def _sizes(self, name: str, value: Size, least: int) -> tuple[int, ...]:
        sizes = (value,) * self.dimensions if isinstance(value, int) else tuple(value)
        if len(sizes) != self.dimensions or not all(isinstance(size, int) and size >= least for size in sizes):
            raise ValueError(f"{name}: expected an int or {self.dimensions} ints of at least {least}, got {value!r}")
        return sizes

    def reset_parameters(self) -> None:
        """Draw new weights, and set the basis to its start."""
        self.basis.reset_parameters()
        fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
        init_weights(self.coef, self.base_weight, self.bias, self.basis.spec, self.init_scale, fan_in)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, *S)`, or `(C, *S)`, to `(N, O, *S')`, or `(O, *S')`."""
        single = isinstance(x, Tensor) and x.dim() == self.dimensions + 1
        batch = x.unsqueeze(0) if single else x
        checks.shape("x", batch, (None, self.in_channels, *[None] * self.dimensions))
        self._check_extent(batch)
        y = self._convolved(batch)
        y = y if self.bias is None else y + self.bias.reshape(-1, *[1] * self.dimensions)
        return y.squeeze(0) if single else y

    def _check_extent(self, x: Tensor) -> None:
        for size, kernel, padding, dilation in zip(x.shape[2:], self.kernel_size, self.padding, self.dilation, strict=True):
            if size + 2 * padding < dilation * (kernel - 1) + 1:
                raise ValueError(f"x: expected spatial sizes that the kernel {self.kernel_size} fits into, got shape {tuple(x.shape)}")

    def _convolved(self, x: Tensor) -> Tensor:
        geometry: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        if isinstance(self.basis.spec, Rational):
            return self._rational(x, geometry)
        operands = self.basis.operands()
        if self.base is None or isinstance(self.base, str):
            fused: dict[str, Any] = {"base_weight": self.base_weight, "base": self.base or "silu"}
            return basis_conv(x, self.coef, **operands, **fused, **geometry, pad_input=self.pad == "input")
        y = basis_conv(x, self.coef, **operands, **geometry, pad_input=self.pad == "input")
        return y + self._base_branch(x, geometry)

    def _rational(self, x: Tensor, geometry: dict[str, Any]) -> Tensor:
        """K = 1: an ordinary convolution of the activated image."""
        geometry = dict(geometry)
        padded = x
        if self.pad == "input":
            padded, geometry["padding"] = pad(x, self.padding), (0,) * self.dimensions
        values = self.basis(padded.movedim(1, -1)).squeeze(-1).movedim(-1, 1)
        y = convolve(values, self.coef.squeeze(2), **geometry)
        return y if self.base_weight is None else y + self._base_branch(padded, geometry)

    def _base_branch(self, x: Tensor, geometry: dict[str, Any]) -> Tensor:
        assert self.base is not None
        assert self.base_weight is not None
        if self.pad == "input":
            x, geometry = pad(x, geometry["padding"]), {**geometry, "padding": (0,) * self.dimensions}
        values = activate(x, self.base) if isinstance(self.base, str) else self.base(x)
        return convolve(values, self.base_weight, **geometry)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, base={self.base!r}, bias={self.bias is not None}, pad={self.pad!r}"
        )


class KANConv1d(_KANConv):
    """Kolmogorov-Arnold convolution of sequences, `(N, C, L)` to `(N, O, L')`; see `KANConv2d`."""

    dimensions = 1


class KANConv2d(_KANConv):
    """Kolmogorov-Arnold convolution of images, `(N, C, H, W)` to `(N, O, H', W')`.

    Every tap of the kernel is a function `w b(x) + sum_k c_k B_k(x)`. The basis is evaluated once per pixel and channel, not once per tap.
    The start is that of `KANLinear`, with `C / g` times the taps as fan-in.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size, stride, padding, dilation: an int, or one for each spatial dimension.
        groups: g, divides C and O.
        basis: the functions B_k: a Basis, or its name; built for C inputs.
        base: the function b, as in `KANLinear`; None for no base branch.
        bias: whether to add a bias.
        pad: `"input"`: pad the image with zeros, then evaluate, so that a padded pixel contributes `phi(0)`; `"features"`: evaluate, then
            pad the values with zeros.
        init_scale: as in `KANLinear`.

    Attributes:
        coef: `(O, C / g, K, *kernel)`.
        base_weight: `(O, C / g, *kernel)` or None.
        bias: `(O,)` or None.
        basis: the `BasisFunction`.

    Source: "Convolutional Kolmogorov-Arnold Networks", section 3.
    """

    dimensions = 2


class KANConv3d(_KANConv):
    """Kolmogorov-Arnold convolution of volumes, `(N, C, D, H, W)` to `(N, O, D', H', W')`; see `KANConv2d`."""

    dimensions = 3
