"""Packed products with what follows them in a network: a threshold that gives the next layer's bits, or a residual addition.

A threshold stands for scale, batch normalisation and sign: a sum is positive where ``(sum >= threshold) != flip``. The bits leave as
words like those of ``pack``: 1 where the sum is not positive.
"""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.quantized.functional.bits import _matmul, _pack, check_product, words_of
from phyla.quantized.functional.packed_conv import GEOMETRY, Geometry, Options, _conv2d, check_conv
from phyla.shared import checks
from phyla.shared.kernels import Op


def _threshold(sums: Tensor, threshold: Tensor, flip: Tensor) -> Tensor:
    positive = (sums >= threshold) != flip
    return _pack(positive.to(torch.float32) - 0.5)


def _matmul_threshold(a: Tensor, b: Tensor, length: int, threshold: Tensor, flip: Tensor) -> Tensor:
    return _threshold(_matmul(a, b, length), threshold, flip)


def _conv2d_threshold(x: Tensor, weight: Tensor, threshold: Tensor, flip: Tensor, *geometry: Any) -> Tensor:
    return _threshold(_conv2d(x, weight, *geometry), threshold, flip)


def _output(x: Tensor, rest: tuple[Any, ...]) -> tuple[int, int, int]:
    """Images, height and width of an output; the geometry stands last in what follows the operands."""
    return x.shape[0], *Geometry(*rest[-len(Geometry._fields) :]).output(x.shape[1], x.shape[2])


def _conv2d_threshold_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*_output(x, rest), words_of(weight.shape[0]))


def _conv2d_residual(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    gain: Tensor,
    shift: Tensor,
    shortcut: Tensor | None,
    low: float,
    high: float,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    y = _conv2d(x, weight, *geometry).to(torch.float32) * scale
    if len(gain):
        # Whether gain * y + shift is rounded once or twice is the affair of torch's batch normalisation: let it do that product and sum. It
        # rounds dense operands in one way and strided ones in another.
        gain, shift, zero, one = gain.contiguous(), shift.contiguous(), torch.zeros_like(gain), torch.ones_like(gain)
        y = F.batch_norm(y.movedim(-1, 1), zero, one, gain, shift, False, 0.0, 0.0).movedim(1, -1)
    if shortcut is not None:
        y = y + shortcut
    y = y.clamp(low, high).contiguous()
    return y, _pack(y)


def _conv2d_residual_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lead, channels = _output(x, rest), weight.shape[0]
    return x.new_empty(*lead, channels, dtype=torch.float32), x.new_empty(*lead, words_of(channels))


_matmul_threshold_op = Op(
    "phyla_quantized::packed_matmul_threshold(Tensor a, Tensor b, int length, Tensor threshold, Tensor flip) -> Tensor",
    _matmul_threshold,
    fake=lambda a, b, length, threshold, flip: a.new_empty(*a.shape[:-1], words_of(b.shape[0])),
)
_conv2d_threshold_op = Op(
    f"phyla_quantized::packed_conv2d_threshold(Tensor x, Tensor weight, Tensor threshold, Tensor flip, {GEOMETRY}) -> Tensor",
    _conv2d_threshold,
    fake=_conv2d_threshold_fake,
)
_conv2d_residual_op = Op(
    "phyla_quantized::packed_conv2d_residual(Tensor x, Tensor weight, Tensor scale, Tensor gain, Tensor shift, Tensor? shortcut, "
    f"float low, float high, {GEOMETRY}) -> (Tensor, Tensor)",
    _conv2d_residual,
    fake=_conv2d_residual_fake,
)


def _per_channel(name: str, value: object, channels: int, dtype: torch.dtype) -> Tensor:
    tensor = checks.shape(name, value, (channels,))
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {str(dtype).removeprefix('torch.')}, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


def _check_threshold(threshold: object, flip: object, channels: int) -> tuple[Tensor, Tensor]:
    return _per_channel("threshold", threshold, channels, torch.int32), _per_channel("flip", flip, channels, torch.bool)


def packed_matmul_threshold(a: Tensor, b: Tensor, length: int, threshold: Tensor, flip: Tensor) -> Tensor:
    """The bits of a thresholded packed product.

    Args:
        a: int64 words (..., M, ceil(length/64)).
        b: int64 words (N, ceil(length/64)).
        length: number of elements of a row.
        threshold: int32 (N,), compared with the products.
        flip: bool (N,), True where small products are the positive ones.

    Returns:
        int64 words (..., M, ceil(N/64)) of ``(product >= threshold) != flip``, 0 where that is true.

    Raises:
        TypeError: operands of another dtype.
        ValueError: shapes that disagree.

    Source: "FINN: A Framework for Fast, Scalable Binarized Neural Network Inference", section 4.2.2.
    """
    left, right, count = check_product(a, b, length)
    words: Tensor = _matmul_threshold_op(left, right, count, *_check_threshold(threshold, flip, right.shape[0]))
    return words


def packed_conv2d_threshold(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    flip: Tensor,
    **options: Unpack[Options],
) -> Tensor:
    """The bits of a thresholded packed convolution: the next layer's input.

    Args:
        x: int64 words (N, H, W, ceil(channels/64)).
        weight: int64 words (O, ceil(kh kw channels / groups / 64)), as of ``packed_conv2d``.
        threshold: int32 (O,), compared with the sums.
        flip: bool (O,), True where small sums are the positive ones.
        options: the keyword arguments of ``packed_conv2d``: ``channels`` and ``kernel_size``; ``stride``, ``padding``, ``dilation``,
            ``groups`` and ``padding_value``.

    Returns:
        int64 words (N, Ho, Wo, ceil(O/64)) of ``(sum >= threshold) != flip``, 0 where that is true.

    Raises:
        TypeError: operands of another dtype.
        ValueError: shapes or sizes that disagree.

    Source: "FINN: A Framework for Fast, Scalable Binarized Neural Network Inference", section 4.2.2.
    """
    images, filters, geometry = check_conv(x, weight, **options)
    words: Tensor = _conv2d_threshold_op(images, filters, *_check_threshold(threshold, flip, filters.shape[0]), *geometry)
    return words


def packed_conv2d_residual(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor | None = None,
    *,
    gain: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """A packed convolution with what follows it in a residual network: ``y = clamp((sums scale) gain + shift + shortcut, low, high)``.

    Each step is rounded as `BinaryConv2d`, `batch_norm` in eval mode, addition and `hardtanh` round it one after the other.

    Args:
        x: int64 words (N, H, W, ceil(channels/64)).
        weight: int64 words (O, ceil(kh kw channels / groups / 64)), as of ``packed_conv2d``.
        scale: float32 (O,), the layer's factor, or the slope of a batch normalisation folded with it.
        shift: float32 (O,), the batch normalisation's value at 0.
        shortcut: float32 (N, Ho, Wo, O), or None.
        gain: float32 (O,), slope of the batch normalisation where it is kept apart from the factor; None for 1.
        low: least value; -1 with ``high=1`` for Hardtanh.
        high: largest value.
        options: the keyword arguments of ``packed_conv2d``: ``channels`` and ``kernel_size``; ``stride``, ``padding``, ``dilation``,
            ``groups`` and ``padding_value``.

    Returns:
        y, float32 (N, Ho, Wo, O), and its signs as ``pack`` gives them, int64 words (N, Ho, Wo, ceil(O/64)).

    Raises:
        TypeError: operands of another dtype.
        ValueError: shapes or sizes that disagree, or ``low`` above ``high``.

    Source: "Bi-Real Net: Enhancing the Performance of 1-bit CNNs With Improved Representational Capability", section 3.2, for the shortcut.
    """
    images, filters, geometry = check_conv(x, weight, **options)
    out_channels = filters.shape[0]
    if not low <= high:
        raise ValueError(f"low: expected a number of at most high={high}, got {low}")
    if shortcut is not None:
        checks.shape("shortcut", shortcut, (images.shape[0], *geometry.output(images.shape[1], images.shape[2]), out_channels))
        if shortcut.dtype != torch.float32:
            raise TypeError(f"shortcut: expected float32, got {str(shortcut.dtype).removeprefix('torch.')}")
        shortcut = shortcut.detach()
    named = (("scale", scale), ("gain", torch.ones(out_channels, device=images.device) if gain is None else gain), ("shift", shift))
    factors = [_per_channel(name, value, out_channels, torch.float32).detach() for name, value in named]
    y, words = _conv2d_residual_op(images, filters, *factors, shortcut, float(low), float(high), *geometry)
    return y, words
