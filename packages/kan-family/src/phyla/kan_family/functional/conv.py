"""Convolutions with a basis on every tap: the basis is evaluated once per pixel and channel, then one ordinary convolution.

Legend: N samples, C channels, K basis functions of a channel, O output channels, g groups; `*S` the spatial sizes, `*R` those of the
kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.kan_family.functional.basis import activate, evaluate
from phyla.shared import checks
from phyla.shared.kernels import Kernel

_TILE_ELEMENTS = 1 << 22  # of basis values: 16 MiB of float32


def convolve(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """Cross-correlation in as many dimensions as `stride` has entries."""
    result: Tensor = torch.convolution(x, weight, None, list(stride), list(padding), list(dilation), False, [0] * len(stride), groups)
    return result


def pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Zeros on both sides of the spatial dimensions."""
    return F.pad(x, [p for size in reversed(padding) for p in (size, size)])


def _basis_conv_composite(
    x: Tensor,
    coef: Tensor,
    base_weight: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    kind: str,
    base: str,
    ints: Sequence[int],
    floats: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_input: bool,
) -> Tensor:
    weight = (coef if base_weight is None else torch.cat([coef, base_weight.unsqueeze(2)], 2)).flatten(1, 2)
    if pad_input:
        x, padding = pad(x, padding), [0] * len(padding)
    functions = weight.shape[1] * groups // x.shape[1]
    samples = max(1, _TILE_ELEMENTS // max(1, x[:1].numel() * functions))
    tiles = []
    for tile in torch.split(x, samples):
        pixels = tile.movedim(1, -1)
        phi = evaluate(pixels, first, second, kind, ints, floats)
        if base_weight is not None:
            phi = torch.cat([phi, activate(pixels, base).unsqueeze(-1)], -1)
        tiles.append(convolve(phi.flatten(-2).movedim(-1, 1), weight, stride, padding, dilation, groups))
    return torch.cat(tiles)


def _basis_conv_fake(x: Tensor, coef: Tensor, *rest: Any) -> Tensor:
    stride, padding, dilation = rest[7:10]
    sizes = [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(x.shape[2:], coef.shape[3:], stride, padding, dilation, strict=True)
    ]
    return x.new_empty(x.shape[0], coef.shape[0], *sizes)


_basis_conv = Kernel(
    "phyla_kan_family::basis_conv(Tensor x, Tensor coef, Tensor? base_weight, Tensor? first, Tensor? second, str kind, str base, "
    "int[] ints, float[] floats, int[] stride, int[] padding, int[] dilation, int groups, bool pad_input) -> Tensor",
    _basis_conv_composite,
    differentiable=("x", "coef", "base_weight", "first", "second"),
    fake=_basis_conv_fake,
    autocast=("x", "coef", "base_weight"),
)


def basis_conv(
    x: Tensor,
    coef: Tensor,
    kind: str,
    *,
    first: Tensor | None = None,
    second: Tensor | None = None,
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
    base_weight: Tensor | None = None,
    base: str = "silu",
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    pad_input: bool = True,
) -> Tensor:
    """Convolution of the basis values of every channel; see `basis.evaluate` for the arguments of the basis.

    Args:
        x: `(N, C, *S)`.
        coef: `(O, C / g, K, *R)`.
        base_weight: `(O, C / g, *R)`, or None for no base branch.
        base: activation of the base branch.
        stride, padding, dilation: one number for each spatial dimension.
        groups: g.
        pad_input: pad `x`, then evaluate, so that a padded pixel counts as 0; else evaluate, then pad the values with zeros.

    Returns:
        `(N, O, *S')`.
    """
    checks.floating("x", x)
    lists = [list(v) for v in (ints, floats, stride, padding, dilation)]
    y: Tensor = _basis_conv(x, coef, base_weight, first, second, kind, base, *lists, groups, pad_input)
    return y
