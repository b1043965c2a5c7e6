"""Feature reductions of AF-KAN: from the M activation-pair features of every input to one number per input.

Legend: B rows, I inputs, M features per input, ``f (B, I, M)`` the features of :func:`activation_pair_basis`, which no function here keeps.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from phyla.kan_family.functional.basis import Activation, Combine, activation_pair_basis
from phyla.shared import checks
from phyla.shared.kernels import Kernel

__all__ = ["AFKANSums", "afkan_global", "afkan_multistep", "afkan_spatial", "afkan_sums"]


class AFKANSums(NamedTuple):
    """What the reductions need of the features.

    Attributes:
        total: (..., I), ``sum_m f``.
        score: (..., I), ``sum_m score_weight_m f``.
        smallest: (), the minimum of all features; 0 if there is none.
        largest: (), their maximum; 0 if there is none.
    """

    total: Tensor
    score: Tensor
    smallest: Tensor
    largest: Tensor


def _sums_composite(
    x: Tensor, low: Tensor, high: Tensor, score_weight: Tensor, activation: Activation, combine: Combine
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = activation_pair_basis(x, low, high, activation=activation, combine=combine)
    # The sum of no features is the 0 that stands for their extremes.
    smallest, largest = (features.amin(), features.amax()) if features.numel() else (features.sum(), features.sum())
    return features.sum(-1), features @ score_weight, smallest, largest


def _sums_fake(
    x: Tensor, low: Tensor, high: Tensor, score_weight: Tensor, activation: Activation, combine: Combine
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(()), x.new_empty(())


_sums = Kernel(
    "phyla_kan_family::afkan_sums(Tensor x, Tensor low, Tensor high, Tensor score_weight, str activation, str combine)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _sums_composite,
    differentiable=("x", "low", "high", "score_weight"),
    fake=_sums_fake,
)


def _spatial_composite(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    bias: Tensor,
    temperature: Tensor,
    smallest: Tensor,
    largest: Tensor,
    activation: Activation,
    combine: Combine,
) -> Tensor:
    features = activation_pair_basis(x, low, high, activation=activation, combine=combine)
    f_BMI = ((features - smallest) * _inverse_span(smallest, largest)).reshape(-1, *features.shape[-2:]).transpose(1, 2)
    scores = F.conv1d(f_BMI, weight, bias, padding=1, groups=weight.shape[0])
    return ((scores / temperature.clamp(min=1)).softmax(1) * f_BMI).sum(1).reshape(x.shape)


_spatial = Kernel(
    "phyla_kan_family::afkan_spatial(Tensor x, Tensor low, Tensor high, Tensor weight, Tensor bias, Tensor temperature, Tensor smallest,"
    " Tensor largest, str activation, str combine) -> Tensor",
    _spatial_composite,
    differentiable=("x", "low", "high", "weight", "bias", "temperature", "smallest", "largest"),
    fake=lambda x, *_: x.new_empty(x.shape),
)


def afkan_sums(
    x: Tensor, low: Tensor, high: Tensor, score_weight: Tensor, *, activation: Activation = "silu", combine: Combine = "quad1"
) -> AFKANSums:
    """Sum, weighted sum, minimum and maximum of the activation-pair features, in one pass over ``x``.

    Args:
        x: (..., I).
        low: (M,), the left ends of the intervals.
        high: (M,), the right ends.
        score_weight: (M,), the weights of ``score``.
        activation: the function applied to ``x - low`` and ``high - x``, see :func:`activation_pair_basis`.
        combine: how the two halves become one feature, idem.

    Returns:
        The sums; differentiable in every tensor. Gradients of the extremes flow to where they are taken, ties share equally.

    Raises:
        TypeError: if a tensor is not floating.
        ValueError: if ``low``, ``high`` and ``score_weight`` are not of one length.

    Source: "AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks", section 3.
    """
    checks.floating("x", x)
    checks.shape("low", low, (None,))
    checks.shape("high", high, low.shape)
    checks.shape("score_weight", score_weight, low.shape)
    return AFKANSums(*_sums(x, low, high, score_weight, activation, combine))


def _inverse_span(smallest: Tensor, largest: Tensor) -> Tensor:
    """``1 / (largest - smallest)``, and 1 where the features are constant, so that they normalise to 0 and not to NaN."""
    return torch.where(largest > smallest, largest - smallest, 1.0).reciprocal()


def afkan_global(
    sums: AFKANSums, score_weight: Tensor, score_bias: Tensor, temperature: Tensor, smallest: Tensor, largest: Tensor
) -> Tensor:
    """Global attention: ``z_i = p_i sum_m f_im`` with ``p = softmax_i((W_s f_i + b_s) / max(T, 1))`` over the inputs.

    The features ``f`` are normalised, ``(f - smallest) / (largest - smallest)``, by their sums alone.

    Args:
        sums: of the raw features, by :func:`afkan_sums` with the same ``score_weight``.
        score_weight: (M,), ``W_s``.
        score_bias: (1,), ``b_s``.
        temperature: (), ``T``.
        smallest: (), the value that becomes 0.
        largest: (), the value that becomes 1.

    Returns:
        (..., I).

    Source: "AF-KAN", global attention.
    """
    inverse = _inverse_span(smallest, largest)
    # A softmax over the inputs is blind to b_s and to the shift by `smallest`; the bias keeps a gradient, of exactly 0.
    scale = inverse / temperature.clamp(min=1) + 0 * score_bias.sum()
    attention = (sums.score * scale).softmax(-1)
    return attention * (sums.total - score_weight.numel() * smallest) * inverse


def afkan_multistep(sums: AFKANSums, score_weight: Tensor, score_bias: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
    """A linear map of the normalised features: ``z_i = W_s f_i + b_s``.

    Args:
        sums: of the raw features, by :func:`afkan_sums` with the same ``score_weight``.
        score_weight: (M,), ``W_s``.
        score_bias: (1,), ``b_s``.
        smallest: (), the value that becomes 0.
        largest: (), the value that becomes 1.

    Returns:
        (..., I).

    Source: "AF-KAN", multistep.
    """
    inverse = _inverse_span(smallest, largest)
    return torch.addcmul(score_bias - smallest * inverse * score_weight.sum(), sums.score, inverse)


def afkan_spatial(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    bias: Tensor,
    temperature: Tensor,
    smallest: Tensor,
    largest: Tensor,
    *,
    activation: Activation = "silu",
    combine: Combine = "quad1",
) -> Tensor:
    """Spatial attention: ``z_i = sum_m p_im f_im``, ``p`` the softmax over the features of a 3-tap filter along the inputs, one a feature.

    Args:
        x: (..., I).
        low: (M,), the left ends of the intervals.
        high: (M,), the right ends.
        weight: (M, 1, 3), the filters.
        bias: (M,).
        temperature: (), ``T``; the scores are divided by ``max(T, 1)``.
        smallest: (), the feature that normalises to 0.
        largest: (), the feature that normalises to 1.
        activation: see :func:`activation_pair_basis`.
        combine: idem.

    Returns:
        (..., I).

    Raises:
        TypeError: if a tensor is not floating.
        ValueError: if ``low``, ``high``, ``weight`` and ``bias`` do not fit together.

    Source: "AF-KAN", spatial attention.
    """
    checks.floating("x", x)
    checks.shape("low", low, (None,))
    checks.shape("high", high, low.shape)
    checks.shape("weight", weight, (*low.shape, 1, 3))
    checks.shape("bias", bias, low.shape)
    return _spatial(x, low, high, weight, bias, temperature, smallest, largest, activation, combine)  # type: ignore[no-any-return]
