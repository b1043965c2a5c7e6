"""Learnable activations of ReActNet: a sign with a threshold, and a PReLU that is shifted on both axes, for each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phyla.quantized.binarizers import ApproxSign, Binarizer
from phyla.shared import checks


def _along(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    """A vector of channels, shaped to stand along dimension `dim` of x. Raises: TypeError, ValueError."""
    checks.floating("x", x)
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != len(vector):
        raise ValueError(f"x: expected {len(vector)} channels in dimension {dim}, got shape {tuple(x.shape)}")
    return vector.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])


class RSign(Binarizer):
    """sign(x + shift) with a learned shift for each channel; a binarizer of inputs.

    Args:
        num_channels: Channels of the input.
        binarizer: Sign with its surrogate derivative; `ApproxSign()` if None.
        dim: Dimension of the channels.
        device: Device of the shift.
        dtype: Floating dtype of the shift.

    Raises:
        TypeError, ValueError: If an argument is none of the above.

    Source: "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions", equation 2 (`shift` is minus alpha).
    """

    def __init__(
        self,
        num_channels: int,
        *,
        binarizer: Binarizer | None = None,
        dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels, self.dim = checks.positive_int("num_channels", num_channels), dim
        self.binarizer = ApproxSign() if binarizer is None else binarizer
        if not isinstance(self.binarizer, Binarizer):
            raise TypeError(f"binarizer: expected a Binarizer, got {type(binarizer).__name__}")
        self.shift = nn.Parameter(torch.empty(self.num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No shift."""
        nn.init.zeros_(self.shift)

    @property
    def is_binary(self) -> bool:
        """Whether the binarizer's values are -1 and +1."""
        return self.binarizer.is_binary

    def forward(self, x: Tensor) -> Tensor:
        """Signs of the shifted `x`, of any shape with `num_channels` along `dim`."""
        y: Tensor = self.binarizer(x + _along(self.shift, x, self.dim).to(x.dtype))
        return y

    def normalized(self, x: Tensor, *, batched: bool = True) -> Tensor:
        """Signs of the shifted `x`, with the surrogate at the normalized sum: the thresholds do not move."""
        return self.binarizer.normalized(x + _along(self.shift, x, self.dim).to(x.dtype), batched=batched)

    def extra_repr(self) -> str:
        """Channels and their dimension."""
        return f"{self.num_channels}, dim={self.dim}"


class RPReLU(nn.Module):
    """PReLU(x - gamma) + zeta with gamma, zeta and the slope of the negative part learned for each channel.

    Args:
        num_channels: Channels of the input.
        slope: Initial slope of the negative part.
        dim: Dimension of the channels.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError, ValueError: If an argument is none of the above.

    Source: "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions", equation 4.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        slope: float = 0.25,
        dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels, self.dim = checks.positive_int("num_channels", num_channels), dim
        self.initial_slope = checks.in_range("slope", slope)
        self.gamma, self.zeta, self.slope = (nn.Parameter(torch.empty(self.num_channels, device=device, dtype=dtype)) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No shifts, and the initial slope."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.zeta)
        nn.init.constant_(self.slope, self.initial_slope)

    def forward(self, x: Tensor) -> Tensor:
        """Activations of `x`, of any shape with `num_channels` along `dim`."""
        gamma, zeta, slope = (_along(p, x, self.dim).to(x.dtype) for p in (self.gamma, self.zeta, self.slope))
        centred = x - gamma
        return torch.where(centred > 0, centred, slope * centred) + zeta

    def extra_repr(self) -> str:
        """Channels, their dimension and the initial slope."""
        return f"{self.num_channels}, slope={self.initial_slope}, dim={self.dim}"
