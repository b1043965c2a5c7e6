"""Exact convolution and max pooling of packed channels-last images."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Required, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.quantized.functional.bits import BLOCK, EXACT, _unpack, check_words, flip_words
from phyla.shared import checks
from phyla.shared.kernels import Op

Pair = int | tuple[int, int]


class Geometry(NamedTuple):
    """What a convolution is but for its operands, as the ops take it. Pairs are (height, width)."""

    channels: int
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    padding_value: int

    @property
    def length(self) -> int:
        """Products of one output value."""
        return self.kernel_size[0] * self.kernel_size[1] * (self.channels // self.groups)

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel_size, self.stride, self.padding, self.dilation
        return (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1


GEOMETRY = "int channels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, int padding_value"


class Options(TypedDict, total=False):
    """The keyword arguments of all packed convolutions; `packed_conv2d` tells what they are."""

    channels: Required[int]
    kernel_size: Required[Pair]
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    padding_value: Literal[0, 1, -1]


def _whole(name: str, value: object, least: int = 1) -> int:
    return value if type(value) is int and value >= least else checks.positive_int(name, value)  # most calls need no more than this


def _pair(name: str, value: object, least: int = 1) -> list[int]:
    if not isinstance(value, tuple | list):
        return [_whole(name, value, least)] * 2
    if len(value) != 2:
        raise ValueError(f"{name}: expected an int or two of them, got {value!r}")
    return [_whole(name, v, least) for v in value]


def check_conv(
    x: object,
    weight: object,
    *,
    channels: object,
    kernel_size: object,
    stride: object = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: object = 1,
    padding_value: object = 0,
) -> tuple[Tensor, Tensor, Geometry]:
    """The operands and the geometry of a packed convolution. Raises: TypeError, ValueError."""
    count, blocks = _whole("channels", channels), _whole("groups", groups)
    if count % blocks:
        raise ValueError(f"groups must divide channels: got groups={blocks}, channels={count}")
    if type(padding_value) is not int or padding_value not in (0, 1, -1):
        raise ValueError(f"padding_value: expected 0, 1 or -1, got {padding_value!r}")
    geometry = Geometry(
        count,
        _pair("kernel_size", kernel_size),
        _pair("stride", stride),
        _pair("padding", padding, 0),
        _pair("dilation", dilation),
        blocks,
        padding_value,
    )
    images = check_words("x", x, count, 4, of="channels")
    filters = check_words("weight", weight, geometry.length, 2, of="elements (kernel height x kernel width x channels / groups)")
    if filters.shape[0] % blocks:
        raise ValueError(f"weight: expected a number of output channels that groups={blocks} divides, got shape {tuple(filters.shape)}")
    if geometry.length >= 1 << 31:
        raise ValueError(f"kernel_size: expected less than 2**31 products an output, got {geometry.length}")
    sizes = geometry.output(images.shape[1], images.shape[2])
    if sizes[0] < 1 or sizes[1] < 1:
        raise ValueError(f"x: expected an image that the kernel fits in with its padding, got shape {tuple(images.shape)} for {geometry}")
    return images, filters, geometry


def _signs(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Images (N, C, H, W) in memory of channels-last order."""
    return _unpack(x, channels, dtype).permute(0, 3, 1, 2)


def _conv2d(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    g = Geometry(*options)
    dtype = torch.float32 if g.length < EXACT else torch.float64
    out_channels, (rows, cols) = len(weight), g.output(x.shape[1], x.shape[2])
    filters = _unpack(weight, g.length, dtype).reshape(out_channels, *g.kernel_size, g.channels // g.groups).permute(0, 3, 1, 2)
    out = x.new_empty(len(x), rows, cols, out_channels, dtype=torch.int32)
    (top, left), size = g.padding, x.shape[1] * x.shape[2] * g.channels + rows * cols * out_channels
    step = max(1, BLOCK // max(size, 1))
    for i in range(0, len(x) if out_channels else 0, step):
        images = F.pad(_signs(x[i : i + step], g.channels, dtype), (left, left, top, top), value=float(g.padding_value))
        sums = F.conv2d(images, filters, None, g.stride, 0, g.dilation, g.groups)
        out[i : i + step] = sums.permute(0, 2, 3, 1).round()  # a back end may sum in another domain, off an integer by its rounding
    return out


def _conv2d_fake(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    sizes = Geometry(*options).output(x.shape[1], x.shape[2])
    return x.new_empty(x.shape[0], *sizes, weight.shape[0], dtype=torch.int32)


_conv2d_op = Op(f"phyla_quantized::packed_conv2d(Tensor x, Tensor weight, {GEOMETRY}) -> Tensor", _conv2d, fake=_conv2d_fake)


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    channels: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    padding_value: Literal[0, 1, -1] = 0,
) -> Tensor:
    """Exact convolution of packed ±1 images, with the integers that ``torch.nn.functional.conv2d`` gives of the signs.

    Args:
        x: int64 words (N, H, W, ceil(channels/64)).
        weight: int64 words (O, ceil(kh kw channels / groups / 64)): rows of ``weight.permute(0, 2, 3, 1).flatten(1)``, packed.
        channels: channels C of the images.
        kernel_size: (kh, kw), or one int for both; so are the next three.
        stride: steps of the window.
        padding: pixels added on each side.
        dilation: distance of the taps.
        groups: blocks of channels that are convolved apart.
        padding_value: what stands in the added pixels: 0 adds nothing to a sum; +1 or -1.

    Returns:
        int32 (N, Ho, Wo, O).

    Raises:
        TypeError: operands that are not int64 words, or sizes that are no ints.
        ValueError: words of another width than the sizes need; ``groups`` that does not divide; a kernel larger than the image.

    Source: "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", section 3.2.
    """
    images, filters, geometry = check_conv(
        x,
        weight,
        channels=channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_value=padding_value,
    )
    sums: Tensor = _conv2d_op(images, filters, *geometry)
    return sums


def _pool_sizes(height: int, width: int, kernel: list[int], stride: list[int]) -> tuple[int, int]:
    return (height - kernel[0]) // stride[0] + 1, (width - kernel[1]) // stride[1] + 1


def _max_pool2d(x: Tensor, kernel: list[int], stride: list[int], flip: Tensor | None) -> Tensor:
    rows, cols = _pool_sizes(x.shape[1], x.shape[2], kernel, stride)
    words = x if flip is None else x ^ flip
    out: Tensor | None = None
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            tap = words[:, i : i + (rows - 1) * stride[0] + 1 : stride[0], j : j + (cols - 1) * stride[1] + 1 : stride[1]]
            out = tap.clone() if out is None else out.bitwise_and_(tap)
    assert out is not None
    return out.contiguous() if flip is None else (out ^ flip).contiguous()


def _max_pool2d_fake(x: Tensor, kernel: list[int], stride: list[int], flip: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], *_pool_sizes(x.shape[1], x.shape[2], kernel, stride), x.shape[3])


_max_pool2d_op = Op(
    "phyla_quantized::packed_max_pool2d(Tensor x, int[] kernel_size, int[] stride, Tensor? flip) -> Tensor",
    _max_pool2d,
    fake=_max_pool2d_fake,
)


def packed_max_pool2d(x: Tensor, kernel_size: Pair, stride: Pair | None = None, *, flip: Tensor | None = None) -> Tensor:
    """Max pooling before a threshold, done on the bits behind it: +1 where an input is +1, or in a flipped channel where all are.

    Args:
        x: int64 words (N, H, W, ceil(C/64)).
        kernel_size: (kh, kw), or one int for both.
        stride: steps of the window; the kernel's size where None.
        flip: bool (C,): channels whose threshold falls with the sum, so that their largest sum has the smallest sign.

    Returns:
        int64 words (N, Ho, Wo, ceil(C/64)).

    Raises:
        TypeError: ``x`` is not int64 words, or ``flip`` is not bool.
        ValueError: another number of channels in ``flip`` than the words hold, or a window larger than the image.

    Source: a maximum commutes with a monotone function.
    """
    images = check_words("x", x, 64 * x.shape[-1] if isinstance(x, Tensor) and x.dim() else 0, 4)
    kernel = _pair("kernel_size", kernel_size)
    steps = kernel if stride is None else _pair("stride", stride)
    if images.shape[1] < kernel[0] or images.shape[2] < kernel[1]:
        raise ValueError(f"x: expected an image of at least {kernel[0]} x {kernel[1]} pixels, got shape {tuple(images.shape)}")
    mask: Tensor | None = None
    if flip is not None:
        mask = flip_words(flip, images.shape[-1])
    pooled: Tensor = _max_pool2d_op(images, kernel, steps, mask)
    return pooled
