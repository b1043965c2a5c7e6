"""Signs with a surrogate derivative, and the latent weights of ReCU and IR-Net.

Every sign is -1 where its argument is negative and +1 elsewhere: at 0, at -0.0 and at NaN. Where the argument is no finite number the
surrogate derivative is 0. Second derivatives, forward mode and the transforms of ``torch.func`` are those of the surrogate.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phyla.quantized.functional.clip_mask import hard_sign, masked_sign, straight
from phyla.quantized.functional.normalization import check_samples, scaled_samples
from phyla.shared import checks
from phyla.shared.kernels import Kernel


def _finite(z: Tensor) -> Tensor:
    return torch.where(z.isfinite(), z, torch.zeros_like(z))


def _approx(x: Tensor) -> Tensor:
    """Antiderivative of max(0, 2 - 2|x|)."""
    c = x.clamp(-1, 1)
    return 2 * c - c * c.abs()


def _swish(z: Tensor) -> Tensor:
    """Antiderivative of (2 - z tanh(z/2)) / (1 + cosh z), written with u = exp(-|z|) so that it neither overflows nor cancels."""
    negative = z < 0
    size = torch.where(negative, -z, z).clamp(max=1e4)
    u = torch.exp(-size)
    value = (1 - u) / (1 + u) + 2 * size * u / (1 + u) ** 2
    return torch.where(negative, -value, value)


def _surrogate_composite(x: Tensor, surrogate: str, curve: Tensor) -> Tensor:
    """sign(x) with the derivative of height * F(slope * x), where curve = (slope, height)."""
    antiderivative: Callable[[Tensor], Tensor] = {"approx": _approx, "swish": _swish, "tanh": torch.tanh}[surrogate]
    slope, height = curve.unbind()
    return straight(hard_sign(x), height * antiderivative(_finite(slope * x)))


def _normalized_composite(x: Tensor, surrogate: str, curve: Tensor) -> Tensor:
    """sign(x) with the derivatives of the surrogate at the normalized samples."""
    soft = _surrogate_composite(scaled_samples(x, list(range(1, x.dim()))), surrogate, curve)
    return straight(hard_sign(x), soft)


def _biper_composite(x: Tensor, frequency: float, hard: bool) -> Tensor:
    phase = frequency * x
    return straight(hard_sign(torch.sin(phase)), torch.sin(_finite(phase))) if hard else torch.sin(phase)


_surrogate_sign = Kernel(
    "phyla_quantized::surrogate_sign(Tensor x, str surrogate, Tensor curve) -> Tensor",
    _surrogate_composite,
    differentiable=("x",),
    fake=lambda x, surrogate, curve: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_normalized_sign = Kernel(
    "phyla_quantized::normalized_sign(Tensor x, str surrogate, Tensor curve) -> Tensor",
    _normalized_composite,
    differentiable=("x",),
    fake=lambda x, surrogate, curve: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_biper = Kernel(
    "phyla_quantized::biper(Tensor x, float frequency, bool hard) -> Tensor",
    _biper_composite,
    differentiable=("x",),
    fake=lambda x, frequency, hard: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def _numbers(x: Tensor, curve: Sequence[float] | Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return curve.to(x.device, dtype) if isinstance(curve, Tensor) else torch.tensor(curve, dtype=dtype, device=x.device)


def surrogate_sign(x: Tensor, surrogate: str, curve: Sequence[float] | Tensor) -> Tensor:
    """sign(x) with the surrogate "approx", "swish" or "tanh" of a slope and a height.

    A schedule gives the two numbers as a tensor: a compiled graph then takes them as data, and is not compiled again as they change.
    """
    numbers = _numbers(checks.floating("x", x), curve)
    return _elementwise(lambda t: _surrogate_sign(t, surrogate, numbers), x)


def normalized_sign(x: Tensor, surrogate: str, curve: Sequence[float] | Tensor, *, batched: bool = True) -> Tensor:
    """`surrogate_sign` of `normalize_samples(x)` in one op that keeps x alone: the division moves the surrogate, but changes no sign."""
    check_samples(x, batched)
    numbers = _numbers(x, curve)
    out = _elementwise(lambda t: _normalized_sign(t, surrogate, numbers), x if batched else x.unsqueeze(0))
    return out if batched else out.squeeze(0)


def _elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function`` of x in the order of its memory: a channels-last image stays one, without a copy."""
    if x.dim() == 4 and not x.is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous():
        return function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return function(x)


def sign_ste(x: Tensor, *, clip: float | None = 1.0) -> Tensor:
    """Sign with the straight-through derivative: 1 where abs(x) <= clip, else 0. One bit an element is kept for backward.

    Args:
        x: Any shape, floating.
        clip: Half width of the window, positive; None lets every gradient pass and keeps nothing for backward.

    Returns:
        Tensor of -1 and +1 with the shape and dtype of `x`.

    Raises:
        TypeError: If `x` is no floating tensor or `clip` no number.
        ValueError: If `clip` is not positive.

    Source: "Binarized Neural Networks", section 1.3.
    """
    checks.floating("x", x)
    bound = None if clip is None else checks.in_range("clip", clip, 0.0, low_open=True)
    return _elementwise(lambda t: masked_sign(t, bound), x)


def approx_sign(x: Tensor) -> Tensor:
    """Sign with the derivative max(0, 2 - 2 abs(x)) of a piecewise quadratic function.

    Args:
        x: Any shape, floating; kept for backward.

    Returns:
        Tensor of -1 and +1 with the shape and dtype of `x`.

    Raises:
        TypeError: If `x` is no floating tensor.

    Source: "Bi-Real Net: Enhancing the Performance of 1-bit CNNs With Improved Representational Capability and Advanced Training
        Algorithm", section 3.3.
    """
    return surrogate_sign(x, "approx", (1.0, 1.0))


def swish_sign(x: Tensor, *, beta: float = 5.0) -> Tensor:
    """Sign with the derivative beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x)), in a form that is finite for every x.

    Args:
        x: Any shape, floating; kept for backward.
        beta: Steepness, positive.

    Returns:
        Tensor of -1 and +1 with the shape and dtype of `x`.

    Raises:
        TypeError: If `x` is no floating tensor or `beta` no number.
        ValueError: If `beta` is not positive.

    Source: "BNN+: Improved Binary Network Training", section 3.1 (SignSwish).
    """
    return surrogate_sign(x, "swish", (checks.in_range("beta", beta, 0.0, low_open=True), 1.0))


def ede_sign(x: Tensor, *, t: float, k: float | None = None) -> Tensor:
    """Sign with the derivative k t (1 - tanh^2(t x)), the error decay estimator.

    Args:
        x: Any shape, floating; kept for backward.
        t: Steepness, positive; grows over training.
        k: Height factor, positive; max(1 / t, 1) if None.

    Returns:
        Tensor of -1 and +1 with the shape and dtype of `x`.

    Raises:
        TypeError: If `x` is no floating tensor, or `t` or `k` no number.
        ValueError: If `t` or `k` is not positive.

    Source: "Forward and Backward Information Retention for Accurate Binary Neural Networks", section 3.3.
    """
    slope = checks.in_range("t", t, 0.0, low_open=True)
    height = max(1 / slope, 1.0) if k is None else checks.in_range("k", k, 0.0, low_open=True)
    return surrogate_sign(x, "tanh", (slope, height))


def biper(x: Tensor, *, frequency: float, hard: bool = True) -> Tensor:
    """Periodic binarization: sin(frequency x), or its sign; the derivative of both is frequency cos(frequency x).

    Args:
        x: Any shape, floating; kept for backward.
        frequency: Angular frequency in radians per unit of `x`, positive.
        hard: Whether the sign is taken (stage 2) or the sine itself is given back (stage 1).

    Returns:
        Tensor with the shape and dtype of `x`, of -1 and +1 if `hard`.

    Raises:
        TypeError: If `x` is no floating tensor or `frequency` no number.
        ValueError: If `frequency` is not positive.

    Source: "BiPer: Binary Neural Networks using a Periodic Function", equations 4 to 8.
    """
    checks.floating("x", x)
    omega = checks.in_range("frequency", frequency, 0.0, low_open=True)
    return _elementwise(lambda t: _biper(t, omega, bool(hard)), x)


def _channels(weight: Tensor) -> tuple[Tensor, list[int]]:
    """A weight of shape (O, ...) with at least two elements a channel, and its dimensions but the first."""
    checks.floating("weight", weight)
    if weight.dim() < 2 or weight[0:1].numel() < 2:
        raise ValueError(f"weight: expected shape (out, ...) with at least two elements a channel, got shape {tuple(weight.shape)}")
    return weight, list(range(1, weight.dim()))


def recu_latent(weight: Tensor, *, tau: float) -> Tensor:
    """Weights standardised a channel to a Laplace distribution with b = 2, clamped at the quantile Q(tau) of that distribution.

    Dead weights beyond the quantile come back to it. Q = -E ln(2 - 2 tau), with E the mean absolute value over the whole tensor, is a
    constant for autograd.

    Args:
        weight: `(out, ...)`, floating, at least two elements a channel.
        tau: Quantile, in [0.5, 1).

    Returns:
        Latent weights with the shape and dtype of `weight`; their signs are the binary weights.

    Raises:
        TypeError: If `weight` is no floating tensor or `tau` no number.
        ValueError: If `tau` is outside [0.5, 1), or a channel has fewer than two elements.

    Source: "ReCU: Reviving the Dead Weights in Binary Neural Networks", section 3.2 and appendix.
    """
    return clamped_latent(weight, recu_quantile(tau))


def recu_quantile(tau: float) -> float:
    """The tau-quantile of the Laplace distribution in units of its mean absolute value. Raises: TypeError, ValueError."""
    return -math.log(2 - 2 * checks.in_range("tau", tau, 0.5, 1.0, high_open=True))


def clamped_latent(weight: Tensor, quantile: float | Tensor) -> Tensor:
    """`recu_latent` with the quantile given as a number, or as a tensor: data of a compiled graph."""
    weight, dims = _channels(weight)
    centred = weight - weight.mean(dims, keepdim=True)
    laplace = centred * (2 * math.sqrt(2) / torch.sqrt(centred.var(dims, keepdim=True) + 1e-5))
    bound = laplace.detach().abs().mean() * quantile
    return laplace.clamp(-bound, bound)


def irnet_latent(weight: Tensor) -> Tensor:
    """Weights with mean 0 and standard deviation 1 in each channel, so that their signs carry the most information.

    A channel whose weights are all equal has no standardised form: it becomes NaN.

    Args:
        weight: `(out, ...)`, floating, at least two elements a channel.

    Returns:
        Latent weights with the shape and dtype of `weight`; their signs are the binary weights.

    Raises:
        TypeError: If `weight` is no floating tensor.
        ValueError: If a channel has fewer than two elements.

    Source: "Forward and Backward Information Retention for Accurate Binary Neural Networks", section 3.2 (Libra parameter binarization).
    """
    weight, dims = _channels(weight)
    centred = weight - weight.mean(dims, keepdim=True)
    return centred / centred.std(dims, keepdim=True)
