"""Samples divided by their standard deviation, as ReCU and BiPer do before the sign of an input."""

import torch
from torch import Tensor

from phyla.shared import checks


def check_samples(x: object, batched: bool) -> Tensor:
    """A floating tensor with at least two elements a sample. Raises: TypeError, ValueError."""
    tensor = checks.floating("x", x)
    if tensor.dim() <= batched or tensor[:1].numel() < 2 * min(len(tensor), 1):
        raise ValueError(f"x: expected at least two elements a sample, got shape {tuple(tensor.shape)}")
    return tensor


def scaled_samples(x: Tensor, dims: list[int]) -> Tensor:
    """x over its standard deviation along `dims`."""
    return x * torch.rsqrt(x.var(dims, keepdim=True) + 1e-5)


def normalize_samples(x: Tensor, *, batched: bool = True) -> Tensor:
    """x / sqrt(var(x) + 1e-5), with the variance (n - 1 in the denominator) over one sample; the mean stays.

    Args:
        x: `(batch, ...)`, or one sample of any shape; floating, at least two elements a sample.
        batched: Whether the first dimension is the batch.

    Returns:
        Tensor with the shape and dtype of `x`.

    Raises:
        TypeError: If `x` is no floating tensor.
        ValueError: If a sample has fewer than two elements.

    Source: the released code of "ReCU: Reviving the Dead Weights in Binary Neural Networks".
    """
    check_samples(x, batched)
    return scaled_samples(x, list(range(int(batched), x.dim())))
