"""Slow integer references of packed arithmetic, in numpy, from section 0 of the convention: bit i % 64 of word i // 64, 1 for -1."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_signs(*shape: int, seed: int = 0) -> Tensor:
    """int8 of +1 and -1."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8) * 2 - 1


def words_oracle(signs: Tensor) -> Tensor:
    """Words of ±1 along the last dimension."""
    values = signs.numpy()
    n = values.shape[-1]
    words = np.zeros((*values.shape[:-1], -(-n // 64)), dtype=np.uint64)
    for i in range(n):
        words[..., i // 64] |= (values[..., i] < 0).astype(np.uint64) << np.uint64(i % 64)
    return torch.from_numpy(words.view(np.int64))


def matmul_oracle(a: Tensor, b: Tensor) -> Tensor:
    """Integer products of ±1 rows."""
    return torch.from_numpy(np.einsum("...mk,nk->...mn", a.numpy().astype(np.int64), b.numpy().astype(np.int64)).astype(np.int32))


def conv_oracle(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, padding_value: int) -> Tensor:
    """x (N, H, W, C), weight (O, kh, kw, C/groups) of ±1 -> int32 (N, Ho, Wo, O); one tap at a time."""
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    images = np.pad(x.numpy().astype(np.int64), ((0, 0), (ph, ph), (pw, pw), (0, 0)), constant_values=padding_value)
    filters = weight.numpy().astype(np.int64)
    out_channels, kh, kw, depth = filters.shape
    rows = (images.shape[1] - dh * (kh - 1) - 1) // sh + 1
    cols = (images.shape[2] - dw * (kw - 1) - 1) // sw + 1
    out = np.zeros((len(images), rows, cols, out_channels), dtype=np.int64)
    block = out_channels // groups
    for g in range(groups):
        for i in range(kh):
            for j in range(kw):
                tap = images[:, i * dh : i * dh + (rows - 1) * sh + 1 : sh, j * dw : j * dw + (cols - 1) * sw + 1 : sw]
                tap = tap[..., g * depth : (g + 1) * depth]
                out[..., g * block : (g + 1) * block] += tap @ filters[g * block : (g + 1) * block, i, j].T
    return torch.from_numpy(out.astype(np.int32))


def answers(function: Callable[..., Any], *valid: Any) -> None:
    """With any shape, dtype, stride or device in one argument, ``function`` returns tensors or raises ValueError or TypeError."""
    kinds = (torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64)
    shapes = ((), (0,), (1,), (3,), (2, 3), (0, 2), (2, 0), (1, 1, 1), (4, 2, 3, 1), (2, 0, 3, 1), (1, 5, 5, 2), (1, 1, 1, 1, 1))
    changes: list[Callable[[Tensor], Any]] = [
        *(lambda t, kind=kind: t.to(kind) for kind in kinds),
        *(lambda t, shape=shape, kind=kind: torch.zeros(shape, dtype=kind) for shape in shapes for kind in {v.dtype for v in valid}),
        *(lambda t, dim=dim: t.transpose(0, min(dim, t.dim() - 1)) for dim in range(4)),
        *(lambda t, dim=dim: t.narrow(min(dim, t.dim() - 1), 0, 0) for dim in range(4)),
        *(lambda t, dim=dim: torch.cat([t, t], min(dim, t.dim() - 1)) for dim in range(4)),
        lambda t: t.to("meta"),
        lambda t: t.flip(0),
        lambda t: t[:1].expand(t.shape),
        *(lambda t, other=other: other for other in (None, 3, "text", [1.0])),
    ]
    for place in range(len(valid)):
        for change in changes:
            args = [change(a) if i == place else a for i, a in enumerate(valid)]
            try:
                out = function(*args)
            except (ValueError, TypeError) as error:
                assert str(error), "an error without a message"
            else:
                assert isinstance(out, Tensor | tuple)
