"""A residual block on bits: each half is one packed convolution that ends in the next half's floats and bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.quantized.folding import has_statistics
from phyla.quantized.functional.stream import stream_op
from phyla.quantized.layers import BinaryConv2d
from phyla.quantized.models import BinaryBlock
from phyla.quantized.packed import PackedConv2d, plain_sign
from phyla.shared import checks

__all__ = ["PackedBlock"]

Pair = tuple[Tensor, Tensor]


class PackedBlock(nn.Module):
    """A `BinaryBlock` with packed weights, equal to it bit for bit.

    Args:
        block: is read, not changed.
        conv1: its first convolution, packed.
        conv2: its second one.
        last: whether no packed block follows.

    Shape:
        Images `(N, C, H, W)`, or what the block before returns, to images `(N, C', H', W')` from the last block of a chain, else to a pair
        of channels-last floats `(N, H', W', C')` and their packed signs.
    """

    gain1: Tensor
    shift1: Tensor
    gain2: Tensor
    shift2: Tensor

    def __init__(self, block: BinaryBlock, conv1: PackedConv2d, conv2: PackedConv2d, *, last: bool) -> None:
        super().__init__()
        self.conv1, self.conv2, self.shortcut, self.last = conv1, conv2, block.shortcut, last
        for i, bn in ((1, block.bn1), (2, block.bn2)):
            gain, shift = _line(bn)
            self.register_buffer(f"gain{i}", gain)
            self.register_buffer(f"shift{i}", shift)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether a module is a block that this form can take."""
        return type(block) is BinaryBlock and all(
            isinstance(conv, BinaryConv2d)
            and conv.bias is None
            and conv.weight.dtype == torch.float32
            and has_statistics(bn)
            and plain_sign(conv.input_binarizer)
            for conv, bn in ((block.conv1, block.bn1), (block.conv2, block.bn2))
        )

    def forward(self, x: Tensor | Pair) -> Tensor | Pair:
        """Apply the block."""
        stream, words = stream_op.op(self._image(x)) if isinstance(x, Tensor) else x
        around = stream
        if not isinstance(self.shortcut, nn.Identity):
            around = self.shortcut(stream.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        y, words = self.conv1.residual(words, self.gain1, self.shift1, around)
        y, words = self.conv2.residual(words, self.gain2, self.shift2, y)
        return y.permute(0, 3, 1, 2).contiguous() if self.last else (y, words)

    def _image(self, x: Tensor) -> Tensor:
        checks.shape("x", checks.floating("x", x), (None, self.conv1.in_channels, None, None))
        return x.detach().float()

    def settings(self) -> dict[str, Any]:
        """What the block is but for its tensors and its convolutions, in values that JSON knows."""
        return {"type": type(self).__name__, "last": self.last}

    def extra_repr(self) -> str:
        """Whether it is the last, for printing."""
        return f"last={self.last}"


def _line(bn: nn.BatchNorm2d) -> Pair:
    """Slope and value at 0 of a batch normalisation, as torch rounds them."""
    assert bn.running_mean is not None
    with torch.no_grad():
        zero, one = torch.zeros_like(bn.running_mean), torch.ones_like(bn.running_mean).unsqueeze(0)
        gain = F.batch_norm(one, zero, bn.running_var, bn.weight, None, False, 0.0, bn.eps)
        shift = F.batch_norm(0 * one, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
    return gain[0], shift[0]
