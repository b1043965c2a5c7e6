"""How the float stream of a residual network begins: an image in channels-last order, with its packed signs."""

from __future__ import annotations

import torch
from torch import Tensor

from phyla.quantized.functional.bits import _pack, words_of
from phyla.shared.kernels import Op


def _stream(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.movedim(1, -1).clone(memory_format=torch.contiguous_format)
    return y, _pack(y)


stream_op = Op(
    "phyla_quantized::stream(Tensor x) -> (Tensor, Tensor)",
    _stream,
    fake=lambda x: (
        x.new_empty(x.shape[0], x.shape[2], x.shape[3], x.shape[1]),
        x.new_empty(x.shape[0], x.shape[2], x.shape[3], words_of(x.shape[1]), dtype=torch.int64),
    ),
)
