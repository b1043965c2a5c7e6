"""What the layers share: the (y, state) contract, the short convolution, gated norms, and how parameters start."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.linear_rnn.functional import causal_conv1d
from phyla.linear_rnn.functional._sequences import accumulation_dtype
from phyla.linear_rnn.state import LayerState
from phyla.shared import checks

Device = torch.device | str | None


class Recurrent(nn.Module):
    """A layer over sequences: `y, state = layer(x, state)` and, token by token, `y_t, state = layer.step(x_t, state)`.

    Attributes:
        keeps_init: whether the layer's own start of its projections must survive in a model that draws all others anew.
    """

    keeps_init = False

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = checks.positive_int("hidden_size", hidden_size)

    def step(self, x_t: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """One token: x_t (B, hidden_size) and the state before it; returns y_t (B, hidden_size) and the state after it."""
        checks.shape("x_t", x_t, (None, self.hidden_size))
        y, after = self(x_t.unsqueeze(1), state)
        return y.squeeze(1), after

    def _opened(self, x: Tensor, state: LayerState | None, convolutions: int) -> tuple[Any, tuple[Tensor | None, ...]]:
        """The parts of a state, or Nones, once x and the state have the right form."""
        checks.shape("x", checks.floating("x", x), (None, None, self.hidden_size))
        if x.shape[1] < 1:
            raise ValueError(f"x: expected shape (B, T, {self.hidden_size}) with T at least 1, got {tuple(x.shape)}")
        if state is None:
            return None, (None,) * convolutions
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(f"state: expected a LayerState or None, got {type(state).__name__}")
        recurrent, conv = state
        if not isinstance(conv, tuple | list) or len(conv) != convolutions:
            got = f"{len(conv)} of them" if isinstance(conv, tuple | list) else type(conv).__name__
            raise ValueError(f"state.conv: expected a tuple of {convolutions} tensors, got {got}")
        return recurrent, tuple(conv)


class ShortConv(nn.Module):
    """Depthwise causal convolution with SiLU; named and started as torch's `Conv1d`."""

    def __init__(self, channels: int, size: int, *, bias: bool = False, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, checks.positive_int("conv_size", size), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        """Uniform within one over the root of the width."""
        bound = self.weight.shape[-1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs (B, T, channels) and the state before them; outputs of that shape and the state after them."""
        return causal_conv1d(x, self.weight.squeeze(1), self.bias, activation="silu", initial_state=state, cu_seqlens=cu_seqlens)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.weight.shape[0]}, size={self.weight.shape[-1]}, bias={self.bias is not None}"


class Norm(nn.Module):
    """RMS norm of each head, in float32 or better, with an optional factor before it is rounded."""

    def __init__(self, size: int, *, eps: float, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = checks.in_range("norm_eps", eps, 0.0)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """Norm of x (..., heads, size) with the heads joined, (..., heads size), times `factor` of that shape."""
        wide = precise(x)
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).flatten(-2)
        return (y if factor is None else y * factor).to(x.dtype)

    def extra_repr(self) -> str:
        """Size and eps, for printing."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class HeadLayerNorm(nn.Module):
    """Layer norm of each head with a scale (and an offset) for each channel, in float32 or better."""

    def __init__(self, size: int, *, eps: float, bias: bool, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Norm of x (..., heads, width) with the heads joined, in float32 or better."""
        y = F.layer_norm(precise(x), x.shape[-1:], eps=self.eps).flatten(-2) * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Size and eps, for printing."""
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"


def precise(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.to(accumulation_dtype(x))


def heads(x: Tensor, count: int) -> Tensor:
    """(..., count width) as (..., count, width)."""
    return torch.unflatten(x, -1, (count, -1))


def short_convs(
    convs: Sequence[ShortConv | None], inputs: Sequence[Tensor], states: Sequence[Tensor | None], cu_seqlens: Tensor | None
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Each input through its convolution, and the states after them; a layer without convolutions has no such states."""
    present = [conv for conv in convs if conv is not None]
    if not present:
        return list(inputs), ()
    results = [conv(x, state, cu_seqlens) for conv, x, state in zip(present, inputs, states, strict=True)]
    return [y for y, _ in results], tuple(last for _, last in results)


def log_decay(rate: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """`-exp(A_log) softplus(rate + dt_bias)`, in float32 or better."""
    return -precise(A_log).exp() * F.softplus(precise(rate) + precise(dt_bias))


def low_rank(size: int, rank: int, out: int, *, bias: bool, device: Device, dtype: torch.dtype | None) -> nn.Sequential:
    """A linear map through `rank` channels; the bias is that of its second half."""
    first = nn.Linear(size, rank, bias=False, device=device, dtype=dtype)
    return nn.Sequential(first, nn.Linear(rank, out, bias=bias, device=device, dtype=dtype))


def undecayed(size: int, device: Device, dtype: torch.dtype | None) -> nn.Parameter:
    """A vector that optimizers are asked not to decay, by its mark `_no_weight_decay`."""
    parameter = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def reset_projections(*modules: nn.Module) -> None:
    """Xavier-uniform weights of small gain and zero biases for the linear maps, their own start for the other parts."""
    for module in (m for root in modules for m in root.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=2.0**-2.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ShortConv | Norm):
            module.reset_parameters()


@torch.no_grad()
def reset_decay(A_log: Tensor, dt_bias: Tensor, low: float = 1e-3) -> None:
    """exp(A_log) uniform in (low, 16); softplus(dt_bias) log-uniform in (0.001, 0.1)."""
    A_log.uniform_(low, 16.0).log_()  # the public code draws from 0, whose log is -inf
    dt = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp_().clamp_(min=1e-4)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def divided(total_name: str, total: int, name: str, parts: int) -> int:
    """total // parts. Raises: ValueError if it is not whole."""
    if total % parts:
        raise ValueError(f"{name}: must divide {total_name}, got {name}={parts}, {total_name}={total}")
    return total // parts
