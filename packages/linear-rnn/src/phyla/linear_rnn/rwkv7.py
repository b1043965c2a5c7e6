"""RWKV-7: generalised delta rule with a decay and an in-context learning rate for each channel, and token shift."""

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.linear_rnn import _layers as parts
from phyla.linear_rnn.functional import causal_conv1d, dplr
from phyla.linear_rnn.state import LayerState
from phyla.shared import checks


class LoRA(nn.Module):
    """`lora.2(activation(lora.0 x))`: a map through few channels; it starts as its bias."""

    def __init__(self, size: int, rank: int, activation: nn.Module, *, bias: bool, device: parts.Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        first = nn.Linear(size, rank, bias=False, device=device, dtype=dtype)
        self.lora = nn.Sequential(first, activation, nn.Linear(rank, size, bias=bias, device=device, dtype=dtype))

    def reset_parameters(self, bias: Tensor | None) -> None:
        """First matrix 0, second orthogonal with gain 0.1, and this bias."""
        first, _, second = self.lora
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        nn.init.zeros_(first.weight)
        wide = second.weight.new_empty(second.weight.shape, dtype=torch.float32)  # QR knows no half precision
        second.weight.copy_(nn.init.orthogonal_(wide, gain=0.1))
        if bias is not None:
            second.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size)."""
        y: Tensor = self.lora(x)
        return y


class RWKV7(parts.Recurrent):
    """Time mixing of RWKV-7.

    Each input is mixed with its predecessor, differently for each use. The state forgets by a decay for each channel, removes what is
    stored at the key kappa at a learning rate for each channel, and writes k v^T. All layers but the first blend their value with that
    of the first.

    Args:
        hidden_size: Input and output size.
        head_dim: Width of a head.
        layer_idx: Place of the layer in its stack; above 0 it needs `v_first`.
        num_layers: Layers of the stack; with `layer_idx` it decides how the parameters start.
        decay_low_rank_dim: Rank of the decay's projection; by default `max(32, 32 round(2.5 sqrt(hidden_size) (head_dim / 64) / 32))`.
        gate_low_rank_dim: Rank of the output gate's; by default with 5 in place of 2.5, whatever the head.
        a_low_rank_dim: Rank of the learning rate's; by default as the decay's.
        v_low_rank_dim: Rank of the blend's; by default with 1.7 in place of 2.5.
        norm_eps: The norm of the heads adds `head_dim * norm_eps` to their variance.

    Shape:
        `y, state = layer(x, state)` with x and y `(B, T, hidden_size)`.

    Raises:
        TypeError, ValueError: If a size is no positive int, `head_dim` does not divide, or `layer_idx` is not in the stack.

    Source: "RWKV-7 'Goose' with Expressive Dynamic State Evolution", section 4.
    """

    keeps_init = True

    def __init__(
        self,
        hidden_size: int,
        *,
        head_dim: int = 64,
        layer_idx: int = 0,
        num_layers: int = 1,
        decay_low_rank_dim: int | None = None,
        gate_low_rank_dim: int | None = None,
        a_low_rank_dim: int | None = None,
        v_low_rank_dim: int | None = None,
        norm_eps: float = 1e-5,
        device: parts.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        self.head_dim = checks.positive_int("head_dim", head_dim)
        self.num_heads = parts.divided("hidden_size", hidden_size, "head_dim", head_dim)
        self.num_layers = checks.positive_int("num_layers", num_layers)
        self.layer_idx = int(checks.in_range("layer_idx", layer_idx, 0, num_layers, high_open=True))
        self.norm_eps = checks.in_range("norm_eps", norm_eps, 0.0)

        def vector(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        def lora(name: str, rank: int | None, factor: float, activation: nn.Module, bias: bool = True) -> LoRA:
            chosen = max(32, 32 * round(factor * math.sqrt(hidden_size) / 32)) if rank is None else checks.positive_int(name, rank)
            return LoRA(hidden_size, chosen, activation, bias=bias, device=device, dtype=dtype)

        wide = head_dim / 64
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector(1, 1, hidden_size) for _ in range(6))
        self.k_k, self.k_a, self.r_k = vector(hidden_size), vector(hidden_size), vector(self.num_heads, head_dim)
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype) for _ in range(4)
        )
        self.w_lora = lora("decay_low_rank_dim", decay_low_rank_dim, 2.5 * wide, nn.Tanh())
        if layer_idx > 0:
            self.v_lora = lora("v_low_rank_dim", v_low_rank_dim, 1.7 * wide, nn.Identity())
        self.a_lora = lora("a_low_rank_dim", a_low_rank_dim, 2.5 * wide, nn.Identity())
        self.g_lora = lora("gate_low_rank_dim", gate_low_rank_dim, 5.0, nn.Sigmoid(), bias=False)
        self.g_norm = parts.HeadLayerNorm(hidden_size, eps=head_dim * self.norm_eps, bias=True, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set or draw all parameters anew, by the layer's place in its stack."""
        size, head = self.hidden_size, self.head_dim
        depth, rest = self.layer_idx / max(self.num_layers - 1, 1), 1.0 - self.layer_idx / self.num_layers
        j = torch.arange(size, device=self.k_k.device, dtype=torch.float32)
        share, along = j / size, j / max(size - 1, 1)  # a single channel is the first of all
        centre = (head - 1) / 2
        zigzag = (j % head - centre) / max(centre, 0.5)
        zigzag, line = zigzag * zigzag.abs(), along - 0.5
        for power, mixes in ((0.2, (self.x_r, self.x_g)), (0.9, (self.x_w, self.x_a)), (0.7, (self.x_k, self.x_v))):
            for mix in mixes:
                mix.copy_(1.0 - share ** (power * rest))
        self.w_lora.reset_parameters(-6.0 + 6.0 * along ** (1.0 + depth**0.3) + 0.5 + 2.5 * zigzag)
        self.a_lora.reset_parameters(-0.19 + 0.3 * zigzag + 0.4 * line)
        if self.layer_idx > 0:
            self.v_lora.reset_parameters(0.73 - 0.4 * line)
        self.g_lora.reset_parameters(None)
        self.k_k.copy_(0.71 - 0.1 * line)
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        for projection, bound in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5), (self.o_proj, 0.0)):
            projection.weight.uniform_(-bound * size**-0.5, bound * size**-0.5)
        self.g_norm.weight.fill_(((self.layer_idx + 1) / self.num_layers) ** 0.7)
        nn.init.zeros_(self.get_parameter("g_norm.bias"))

    @overload
    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        v_first: Tensor | None = None,
        return_v_first: Literal[False] = False,
    ) -> tuple[Tensor, LayerState]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        v_first: Tensor | None = None,
        return_v_first: Literal[True],
    ) -> tuple[Tensor, LayerState, Tensor]: ...
    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        v_first: Tensor | None = None,
        return_v_first: bool = False,
    ) -> tuple[Tensor, LayerState] | tuple[Tensor, LayerState, Tensor]:
        """Run over sequences.

        Args:
            x: `(B, T, hidden_size)`.
            state: The state after what came before; zeros where None.
            cu_seqlens: `(N + 1,)` offsets in tokens of N sequences packed in a batch of 1.
            v_first: The value of layer 0, `(B, T, hidden_size)`; needed by all other layers.
            return_v_first: Give back the value of layer 0 as a third result.

        Returns:
            y `(B, T, hidden_size)`, the state after the last token, and the value of layer 0 if asked for.

        Raises:
            TypeError, ValueError: If x, the state, the offsets or `v_first` have the wrong form, or `v_first` is missing.
        """
        recurrent, conv = self._opened(x, state, 1)
        r, k, v, kappa, alpha, g, gate, v_first, after = self._inputs(x, conv, cu_seqlens, v_first)
        o, recurrent = dplr(r, k, v, -kappa, kappa * alpha, g, scale=1.0, initial_state=recurrent, cu_seqlens=cu_seqlens)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        y: Tensor = self.o_proj(((self.g_norm(o) + bonus.flatten(-2)) * gate).to(v_first.dtype))
        return (y, LayerState(recurrent, after), v_first) if return_v_first else (y, LayerState(recurrent, after))

    def _inputs(self, x: Tensor, conv: tuple[Tensor | None, ...], cu_seqlens: Tensor | None, v_first: Tensor | None) -> tuple[Any, ...]:
        """By heads r, k, v, the removal key, the learning rate and the log decay; the output gate, layer 0's value, the shift's state."""
        shift = torch.stack([torch.ones_like(self.k_k), torch.zeros_like(self.k_k)], -1)  # a convolution that gives the input before
        previous, last = causal_conv1d(x, shift, initial_state=conv[0], cu_seqlens=cu_seqlens)
        r, w, k, v, a, z = (x + (previous - x) * mix for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g))
        r, k, value = self.r_proj(r), self.k_proj(k), self.v_proj(v)
        if self.layer_idx == 0:
            v_first = value
        elif v_first is None:
            raise ValueError(f"v_first: expected the value of layer 0, which layer {self.layer_idx} needs, got None")
        else:
            checks.shape("v_first", checks.floating("v_first", v_first), tuple(x.shape))
            value = torch.lerp(value, v_first.to(value.dtype), torch.sigmoid(self.v_lora(v)))
        g = -math.exp(-0.5) * torch.sigmoid(parts.precise(self.w_lora(w)))
        alpha = torch.sigmoid(parts.precise(self.a_lora(a)))
        kappa = F.normalize(parts.heads(parts.precise(k * self.k_k), self.num_heads), dim=-1, eps=1e-12)
        k = k * (1.0 + (alpha - 1.0) * self.k_a)
        r, k, value, alpha, g = (parts.heads(t, self.num_heads) for t in (r, k, value, alpha, g))
        return r, k, value, kappa, alpha, g, self.g_lora(z), v_first, (last,)

    def step(  # type: ignore[override]
        self, x_t: Tensor, state: LayerState | None = None, *, v_first: Tensor | None = None, return_v_first: bool = False
    ) -> tuple[Tensor, ...]:
        """One token, as `forward` without its time axis: x_t, y_t and v_first are (B, hidden_size)."""
        checks.shape("x_t", x_t, (None, self.hidden_size))
        before = None if v_first is None else v_first.unsqueeze(1)
        y, after, first = self(x_t.unsqueeze(1), state, v_first=before, return_v_first=True)
        return (y.squeeze(1), after, first.squeeze(1)) if return_v_first else (y.squeeze(1), after)

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"{self.hidden_size}, head_dim={self.head_dim}, layer_idx={self.layer_idx}, num_layers={self.num_layers}"
