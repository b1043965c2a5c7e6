"""Binarizers: a real tensor becomes +-1 in the forward pass and has a surrogate derivative in the backward pass."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from phyla.quantized import functional as QF
from phyla.quantized.functional.binarizers import clamped_latent, normalized_sign, recu_quantile, surrogate_sign
from phyla.shared import checks


class Binarizer(nn.Module):
    """Maps a real tensor to -1 and +1 of the same shape and dtype; all binarizers can stand in each other's place.

    The numbers of a binarizer are plain attributes and travel in the state dict as one float64 tensor, which every file format holds.
    """

    _numbers: ClassVar[tuple[str, ...]] = ()

    @property
    def is_binary(self) -> bool:
        """Whether `forward` returns exactly -1 and +1."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Binary values of `x`, with its shape and dtype."""
        raise NotImplementedError

    def normalized(self, x: Tensor, *, batched: bool = True) -> Tensor:
        """Binary values of `functional.normalize_samples(x)`; where that changes no sign, only the surrogate sees the division."""
        y: Tensor = self(QF.normalize_samples(x, batched=batched))
        return y

    def scale(self, x: Tensor) -> Tensor | None:
        """Positive factor of each output channel, `(x.shape[0],)`, without a gradient; None for no factor."""
        return None

    def set_progress(self, progress: float) -> None:
        """Follow the schedule to `progress`, the share of training that is done, in [0, 1); nothing where there is no schedule.

        Raises:
            TypeError, ValueError: If `progress` is no number in [0, 1).
        """
        checks.in_range("progress", progress, 0.0, 1.0, high_open=True)

    def get_extra_state(self) -> Tensor:
        """The numbers, in the order of their names; 0 stands for None."""
        return torch.tensor([float(getattr(self, name) or 0) for name in self._numbers], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the numbers of `get_extra_state` back.

        Raises:
            TypeError, ValueError: If they are the numbers of another binarizer.
        """
        values = checks.shape(f"state of {type(self).__name__}", state, (len(self._numbers),)).tolist()
        for name, value in zip(self._numbers, values, strict=True):
            setattr(self, name, value or None)

    def extra_repr(self) -> str:
        """The numbers by name."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self._numbers)


class _Surrogate(Binarizer):
    """A sign whose derivative is a curve of a slope and a height."""

    _surrogate: ClassVar[str]

    def _shape(self) -> tuple[float, float] | Tensor:
        """Slope and height; a tensor where they change over training."""
        return 1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Signs of `x`, with its shape and dtype."""
        return surrogate_sign(x, self._surrogate, self._shape())

    def normalized(self, x: Tensor, *, batched: bool = True) -> Tensor:
        """Signs of `x`, with the surrogate at `functional.normalize_samples(x)`; keeps `x` alone for backward."""
        return normalized_sign(x, self._surrogate, self._shape(), batched=batched)


def _positive(name: str, value: float) -> float:
    return checks.in_range(name, value, 0.0, low_open=True)


class SignSTE(Binarizer):
    """Sign with the straight-through derivative 1 where abs(x) <= clip; keeps one bit an element for backward.

    Args:
        clip: Half width of the window, positive; None lets every gradient pass.

    Raises:
        ValueError: If `clip` is not positive.

    Source: "Binarized Neural Networks", section 1.3.
    """

    _numbers = ("clip",)

    def __init__(self, clip: float | None = 1.0) -> None:
        super().__init__()
        self.clip = None if clip is None else _positive("clip", clip)

    def forward(self, x: Tensor) -> Tensor:
        """Signs of `x`, with its shape and dtype."""
        return QF.sign_ste(x, clip=self.clip)


class ApproxSign(_Surrogate):
    """Sign with the derivative max(0, 2 - 2 abs(x)).

    Source: "Bi-Real Net: Enhancing the Performance of 1-bit CNNs With Improved Representational Capability and Advanced Training
        Algorithm", section 3.3.
    """

    _surrogate = "approx"

    def __init__(self) -> None:
        super().__init__()


class SwishSign(_Surrogate):
    """Sign with the derivative of the SignSwish function.

    Args:
        beta: Steepness, positive.

    Raises:
        ValueError: If `beta` is not positive.

    Source: "BNN+: Improved Binary Network Training", section 3.1.
    """

    _numbers = ("beta",)
    _surrogate = "swish"

    def __init__(self, beta: float = 5.0) -> None:
        super().__init__()
        self.beta = _positive("beta", beta)

    def _shape(self) -> tuple[float, float]:
        return self.beta, 1.0


class EDESign(_Surrogate):
    """Sign with the derivative k t (1 - tanh^2(t x)), which a schedule sharpens from nearly straight-through to nearly a sign.

    `set_progress(p)` sets t = t_min (t_max / t_min)^p and k = max(1 / t, 1).

    Args:
        t: Steepness, positive.
        k: Height factor, positive; max(1 / t, 1) if None.
        t_min: Steepness at the start of the schedule.
        t_max: Steepness at its end.

    Raises:
        ValueError: If a number is not positive.

    Source: "Forward and Backward Information Retention for Accurate Binary Neural Networks", section 3.3.
    """

    _numbers = ("t", "k", "t_min", "t_max")
    _surrogate = "tanh"

    def __init__(self, t: float = 0.1, k: float | None = None, *, t_min: float = 0.1, t_max: float = 10.0) -> None:
        super().__init__()
        self._set(t, k)
        self.t_min, self.t_max = _positive("t_min", t_min), _positive("t_max", t_max)

    def _set(self, t: float, k: float | None) -> None:
        self._t, self._k = _positive("t", t), None if k is None else _positive("k", k)
        height = max(1 / self._t, 1.0) if self._k is None else self._k
        self._curve = torch.tensor([self._t, height], dtype=torch.float64, device="cpu")  # data of a compiled graph, not a constant

    @property
    def t(self) -> float:
        """Steepness."""
        return self._t

    @t.setter
    def t(self, t: float) -> None:
        self._set(t, self._k)

    @property
    def k(self) -> float | None:
        """Height factor; None stands for max(1 / t, 1)."""
        return self._k

    @k.setter
    def k(self, k: float | None) -> None:
        self._set(self._t, k)

    def set_progress(self, progress: float) -> None:
        """Set t and k to their values at `progress`, in [0, 1)."""
        super().set_progress(progress)
        low, high = math.log10(self.t_min), math.log10(self.t_max)
        t = 10 ** (low + (high - low) * progress)
        self._set(t, max(1 / t, 1.0))

    def _shape(self) -> Tensor:
        return self._curve


class IRNet(EDESign):
    """Weights standardised a channel, their sign with the EDE surrogate, and a power of two as factor of each channel.

    Args:
        t: Steepness, positive.
        k: Height factor, positive; max(1 / t, 1) if None.
        t_min: Steepness at the start of the schedule (0.001 in the published ResNet-20 script).
        t_max: Steepness at its end.

    Raises:
        ValueError: If a number is not positive.

    Source: "Forward and Backward Information Retention for Accurate Binary Neural Networks", sections 3.2 and 3.3.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Signs of the standardised weights `(out, ...)`."""
        return super().forward(QF.irnet_latent(x))

    normalized = Binarizer.normalized

    def scale(self, x: Tensor) -> Tensor:
        """2^round(log2(mean abs(latent))) of each channel, exact powers of two, `(x.shape[0],)`."""
        size = QF.irnet_latent(x.detach()).abs().flatten(1).mean(1)
        return torch.exp2(size.log2().round())


class ReCU(Binarizer):
    """Signs of weights that are standardised a channel and clamped at the tau-quantile, which revives dead weights.

    `set_progress(p)` sets tau = A e^p + B, from tau_min at 0 to tau_max at 1.

    Args:
        tau: Quantile, in [0.5, 1).
        tau_min: Quantile at the start of the schedule.
        tau_max: Quantile at its end.

    Raises:
        ValueError: If a quantile is outside [0.5, 1).

    Source: "ReCU: Reviving the Dead Weights in Binary Neural Networks", sections 3.2 and 3.4.
    """

    _numbers = ("tau", "tau_min", "tau_max")

    def __init__(self, tau: float = 0.85, *, tau_min: float = 0.85, tau_max: float = 0.99) -> None:
        super().__init__()
        self.tau = tau
        self.tau_min, self.tau_max = (
            checks.in_range(name, value, 0.5, 1.0, high_open=True) for name, value in (("tau_min", tau_min), ("tau_max", tau_max))
        )

    @property
    def tau(self) -> float:
        """Quantile."""
        return self._tau

    @tau.setter
    def tau(self, tau: float) -> None:
        self._quantile = torch.tensor(recu_quantile(tau), dtype=torch.float64, device="cpu")  # data of a compiled graph, not a constant
        self._tau = float(tau)

    def set_progress(self, progress: float) -> None:
        """Set tau to its value at `progress`, in [0, 1)."""
        super().set_progress(progress)
        self.tau = self.tau_min + (self.tau_max - self.tau_min) * math.expm1(progress) / math.expm1(1)

    def forward(self, x: Tensor) -> Tensor:
        """Signs of the clamped standardised weights `(out, ...)`."""
        return QF.sign_ste(clamped_latent(x, self._quantile), clip=None)


class BiPer(Binarizer):
    """Periodic binarization of weights: sin(frequency w) in stage 1, its sign in stage 2, both with the derivative of the sine.

    Args:
        frequency: Angular frequency in radians per unit of weight, positive.
        stage: 1 or 2; `set_stage(model, 2)` turns a model to binary weights.

    Raises:
        ValueError: If `frequency` is not positive or `stage` not 1 or 2.

    Source: "BiPer: Binary Neural Networks using a Periodic Function", section 3.
    """

    _numbers = ("frequency", "stage")

    def __init__(self, frequency: float = 20.0, *, stage: Literal[1, 2] = 1) -> None:
        super().__init__()
        self.frequency = _positive("frequency", frequency)
        self.stage = stage

    @property
    def stage(self) -> Literal[1, 2]:
        """1: the sine itself; 2: its sign."""
        return self._stage

    @stage.setter
    def stage(self, stage: Literal[1, 2]) -> None:
        if isinstance(stage, bool) or stage not in (1, 2):
            raise ValueError(f"stage: expected 1 or 2, got {stage!r}")
        self._stage: Literal[1, 2] = 1 if stage == 1 else 2

    @property
    def is_binary(self) -> bool:
        """Whether the stage is 2."""
        return self.stage == 2

    def forward(self, x: Tensor) -> Tensor:
        """sin(frequency x) in stage 1, its sign in stage 2."""
        return QF.biper(x, frequency=self.frequency, hard=self.stage == 2)


def set_stage(module: nn.Module, stage: Literal[1, 2]) -> None:
    """Set the stage of every `BiPer` below `module`.

    Raises:
        ValueError: If `stage` is not 1 or 2.

    Source: "BiPer: Binary Neural Networks using a Periodic Function", section 3.3.
    """
    BiPer(stage=stage)  # the check also where there is no layer to set
    for part in module.modules():
        if isinstance(part, BiPer):
            part.stage = stage


def set_progress(module: nn.Module, progress: float) -> None:
    """Move the schedule of every binarizer below `module` to `progress`, the share of training that is done, in [0, 1).

    Raises:
        TypeError, ValueError: If `progress` is no number in [0, 1).

    Source: IR-Net, section 3.3, and ReCU, section 3.4.
    """
    checks.in_range("progress", progress, 0.0, 1.0, high_open=True)
    for part in module.modules():
        if isinstance(part, Binarizer):
            part.set_progress(progress)


def biper_penalty(module: nn.Module, *, weight: float) -> Tensor:
    """weight * sum over the layers with BiPer weights of mean(sin^2(frequency W)), to be added to the loss.

    With the published positive sign it draws sin values towards 0, away from -1 and +1; a negative `weight` pushes them outwards. The
    published runs use 0.037 (stage 1) and 0.0468 (stage 2) on CIFAR-10 and none on ImageNet.

    Args:
        module: The model; every module below it whose `weight_binarizer` is a `BiPer` counts.
        weight: Factor of either sign.

    Returns:
        Scalar tensor, differentiable; 0 if there is no such layer.

    Raises:
        TypeError, ValueError: If `weight` is no finite number.

    Source: "BiPer: Binary Neural Networks using a Periodic Function", section 3.4.
    """
    factor = checks.in_range("weight", weight)
    total = torch.zeros(())
    for layer in module.modules():
        binarizer, latent = getattr(layer, "weight_binarizer", None), getattr(layer, "weight", None)
        if isinstance(binarizer, BiPer) and isinstance(latent, Tensor):
            total = total.to(latent) + QF.biper(latent, frequency=binarizer.frequency, hard=False).square().mean()
    return factor * total
