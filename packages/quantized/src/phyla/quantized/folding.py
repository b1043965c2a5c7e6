"""Everything between the sums of a binary layer and the signs that the next one reads, as one comparison of integers a channel.

The sums of K products are integers in [-K, K]. Factor, bias, batch normalisation and whatever else acts on each value alone are evaluated
on all of them, with the operations of the float graph themselves, and the place where the sign turns is looked up. No equation is solved:
ties, roundings, constant channels and falling ones come out as the float graph has them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phyla.shared import checks

__all__ = ["FoldedThreshold", "fold_threshold"]

_BLOCK = 1 << 22


@dataclass(frozen=True)
class FoldedThreshold:
    """A sign as a comparison: a sum s is positive where `(s >= threshold) != flip`.

    Attributes:
        threshold: int32 (C,), in [-K, K + 1]; -K or K + 1 where the sign is the same for every sum.
        flip: bool (C,), True where small sums are the positive ones.
    """

    threshold: Tensor
    flip: Tensor


def fold_threshold(scale: Tensor, bias: Tensor | None, bn: nn.BatchNorm1d | nn.BatchNorm2d, *, length: int) -> FoldedThreshold:
    """The threshold for `sign(bn(sum * scale + bias))`, right for every integer sum in [-length, length].

    Args:
        scale: factor of each channel, floating (C,).
        bias: floating (C,), or None.
        bn: batch normalisation of C channels with running statistics; it is evaluated in eval mode.
        length: K, the number of products of a sum, below 2^24.

    Returns: threshold and flip of each channel.
    Raises:
        TypeError: an argument of another type.
        ValueError: shapes that disagree, a `bn` without running statistics, or a channel whose sign turns more than once, which happens
            only where a value is not finite.

    Source: "FINN: A Framework for Fast, Scalable Binarized Neural Network Inference", section 4.2.2, for the idea.
    """
    if not isinstance(bn, nn.BatchNorm1d | nn.BatchNorm2d):
        raise TypeError(f"bn: expected a BatchNorm1d or BatchNorm2d, got {type(bn).__name__}")
    if not has_statistics(bn):
        raise ValueError("bn: expected one with running statistics, got one that normalises each batch by itself")
    channels = (bn.num_features,)
    checks.shape("scale", checks.floating("scale", scale), channels)
    if bias is not None:
        checks.shape("bias", checks.floating("bias", bias), channels)
    spatial = 2 if isinstance(bn, nn.BatchNorm2d) else 0
    return fold_modules(scale, bias, [copy.deepcopy(bn).eval()], length=length, spatial=spatial).folded


def has_statistics(bn: nn.Module) -> bool:
    """Whether a batch normalisation maps each value alone in eval mode."""
    return isinstance(bn, nn.BatchNorm1d | nn.BatchNorm2d) and bn.running_mean is not None


@dataclass(frozen=True)
class Fold:
    """The threshold of a chain, and the channels in which a maximum over sums has to become a minimum, bool (C,)."""

    folded: FoldedThreshold
    falling: Tensor


def fold_modules(
    scale: Tensor,
    bias: Tensor | None,
    before: Sequence[Callable[[Tensor], Tensor]],
    after: Sequence[Callable[[Tensor], Tensor]] = (),
    *,
    length: int,
    spatial: int,
) -> Fold:
    """Fold `sign(after(maximum(before(sum * scale + bias))))`, where the maximum over a window may be missing.

    Args:
        scale: (C,).
        bias: (C,) or None.
        before: modules that act on each value alone, ahead of the maximum.
        after: such modules behind it.
        length: K.
        spatial: dimensions behind the channel in what the modules expect.

    Raises: ValueError if a channel's sign turns more than once.
    """
    if checks.positive_int("length", length) >= 1 << 24:
        raise ValueError(f"length: expected less than 2**24 products, whose sums float32 holds exactly, got {length}")
    channels, device = scale.shape[0], scale.device
    positive = torch.empty(2 * length + 1, channels, dtype=torch.bool, device=device)
    ends = []
    with torch.no_grad():
        step = max(1, _BLOCK // channels)
        for start in range(0, 2 * length + 1, step):
            sums = torch.arange(start - length, min(start + step, 2 * length + 1) - length, dtype=torch.int32, device=device)
            values = sums.to(scale.dtype).unsqueeze(1) * scale
            values = values if bias is None else values + bias
            values = _run(before, values, spatial)
            ends += [values[0], values[-1]]
            positive[start : start + step] = ~(_run(after, values, spatial) < 0)
    return Fold(_threshold(positive, length), ends[-1] < ends[0])


def _run(modules: Sequence[Callable[[Tensor], Tensor]], values: Tensor, spatial: int) -> Tensor:
    """The modules on values (S, C), laid out as samples or as one image of S pixels."""
    x = values if spatial == 0 else values.T.contiguous().reshape(1, values.shape[1], values.shape[0], *(1,) * (spatial - 1))
    for module in modules:
        x = module(x)
    return x if spatial == 0 else x.reshape(values.shape[1], values.shape[0]).T


def _threshold(positive: Tensor, length: int) -> FoldedThreshold:
    """Threshold and flip of the signs (2K + 1, C) of all sums."""
    count = positive.sum(0)
    flip = positive[0] & ~positive[-1]
    first = torch.where(flip, count, 2 * length + 1 - count)  # place of the first sum behind the turn
    places = torch.arange(2 * length + 1, device=positive.device).unsqueeze(1)
    wrong = (((places >= first) != flip) != positive).any(0)
    if wrong.any():
        channel = int(wrong.nonzero()[0])
        raise ValueError(f"channel {channel}: expected a sign that turns at most once as the sum grows; a value may not be finite")
    return FoldedThreshold((first - length).to(torch.int32), flip)
