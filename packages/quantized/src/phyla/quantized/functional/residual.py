"""The float stream of a residual network, channels last, with its packed signs: its beginning, and the pass behind each convolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.quantized.functional.bits import _pack, words_of
from phyla.shared import checks
from phyla.shared.kernels import Op


def _residual(
    sums: Tensor, scale: Tensor, gain: Tensor, shift: Tensor, shortcut: Tensor | None, low: float, high: float
) -> tuple[Tensor, Tensor]:
    # Whether gain * x + shift is rounded once or twice is the affair of torch's batch normalisation: let it do that product and sum. It
    # rounds dense operands in one way and strided ones in another.
    gain, shift, scaled = gain.contiguous(), shift.contiguous(), sums.contiguous().to(torch.float32) * scale
    zero, one = torch.zeros_like(gain), torch.ones_like(gain)
    y = F.batch_norm(scaled.movedim(-1, 1), zero, one, gain, shift, False, 0.0, 0.0).movedim(1, -1)
    if shortcut is not None:
        y = y + shortcut
    y = y.clamp(low, high).contiguous()
    return y, _pack(y)


def _stream(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.movedim(1, -1).contiguous()
    return y, _pack(y)


stream_op = Op(
    "phyla_quantized::stream(Tensor x) -> (Tensor, Tensor)",
    _stream,
    fake=lambda x: (
        x.new_empty(x.shape[0], x.shape[2], x.shape[3], x.shape[1]),
        x.new_empty(x.shape[0], x.shape[2], x.shape[3], words_of(x.shape[1]), dtype=torch.int64),
    ),
)
residual_op = Op(
    "phyla_quantized::residual(Tensor sums, Tensor scale, Tensor gain, Tensor shift, Tensor? shortcut, float low, float high)"
    " -> (Tensor, Tensor)",
    _residual,
    fake=lambda sums, scale, gain, shift, shortcut, low, high: (
        sums.new_empty(sums.shape, dtype=torch.float32),
        sums.new_empty(*sums.shape[:-1], words_of(sums.shape[-1]), dtype=torch.int64),
    ),
)


def residual(
    sums: Tensor,
    scale: Tensor,
    gain: Tensor,
    shift: Tensor,
    shortcut: Tensor | None = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Factor, batch normalisation, shortcut and clamp of integer sums, with the signs of the result:
    `y = clamp((sums scale) gain + shift + shortcut, low, high)`.

    Each step is rounded as `BinaryConv2d`, `batch_norm` in eval mode, addition and `hardtanh` round it one after the other.

    Args:
        sums: int32 (N, H, W, O), of `packed_conv2d`.
        scale: float32 (O,), the layer's factor.
        gain: float32 (O,), slope of the batch normalisation.
        shift: float32 (O,), its value at 0.
        shortcut: float32 (N, H, W, O), or None.
        low: least value; -1 with `high=1` for hardtanh.
        high: largest value.

    Returns:
        y, float32 (N, H, W, O), and its signs as `pack` gives them, int64 words (N, H, W, ceil(O/64)).

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes that disagree, or `low` above `high`.

    Source: "Bi-Real Net: Enhancing the Performance of 1-bit CNNs With Improved Representational Capability", section 3.2, for the shortcut.
    """
    checks.shape("sums", sums, (None, None, None, None))
    if not low <= high:
        raise ValueError(f"low: expected a number of at most high={high}, got {low}")
    channels = (sums.shape[3],)
    for name, tensor, dtype, shape in (
        ("sums", sums, torch.int32, sums.shape),
        ("scale", scale, torch.float32, channels),
        ("gain", gain, torch.float32, channels),
        ("shift", shift, torch.float32, channels),
        ("shortcut", shortcut, torch.float32, sums.shape),
    ):
        if tensor is not None and checks.shape(name, tensor, shape).dtype != dtype:
            raise TypeError(f"{name}: expected {str(dtype).removeprefix('torch.')}, got {str(tensor.dtype).removeprefix('torch.')}")
    factors = (tensor.detach() for tensor in (scale, gain, shift))
    y, words = residual_op(sums, *factors, None if shortcut is None else shortcut.detach(), float(low), float(high))
    return y, words
