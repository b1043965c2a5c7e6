"""Gated linear attention: a decay for each key channel, no reflections."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.linear_rnn import _layers as parts
from phyla.linear_rnn.functional import linear_attention
from phyla.linear_rnn.state import LayerState
from phyla.shared import checks


class GatedLinearAttention(parts.Recurrent):
    """Linear attention with a data-dependent decay for each key channel.

    `o = linear_attention(q_proj x, k_proj x, v_proj x, g)` with `g = logsigmoid(gk_proj x) / gate_logit_normalizer`, and
    `y = o_proj(norm(o) * silu(g_proj x))`.

    Args:
        hidden_size: Input and output size.
        num_heads: Heads.
        expand_k: Queries and keys have `int(hidden_size * expand_k)` channels in all.
        expand_v: Values have `int(hidden_size * expand_v)` channels in all.
        gate_low_rank_dim: Rank of the decay's projection.
        gate_logit_normalizer: Divides the log decays.
        use_output_gate: Multiply the normalised outputs by `silu(g_proj x)`.
        use_short_conv: A causal convolution and SiLU on queries, keys and values, which else have no activation.
        conv_size: Width of the convolutions.
        conv_bias: Whether they have a bias.
        norm_eps: Added to the mean square in the norm.

    Shape:
        `y, state = layer(x, state)` with x and y `(B, T, hidden_size)`.

    Raises:
        TypeError, ValueError: If a size is no positive int, or the heads do not divide.

    Source: "Gated Linear Attention Transformers with Hardware-Efficient Training", section 4.4. Released checkpoints call the norm
        `g_norm_swish_gate`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16.0,
        use_output_gate: bool = True,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        device: parts.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        self.num_heads = checks.positive_int("num_heads", num_heads)
        key = int(hidden_size * checks.in_range("expand_k", expand_k, num_heads / hidden_size))
        value = int(hidden_size * checks.in_range("expand_v", expand_v, num_heads / hidden_size))
        parts.divided("the key channels", key, "num_heads", num_heads)
        head_v_dim = parts.divided("the value channels", value, "num_heads", num_heads)
        self.gate_logit_normalizer = checks.in_range("gate_logit_normalizer", gate_logit_normalizer, 0.0, low_open=True)
        rank = checks.positive_int("gate_low_rank_dim", gate_low_rank_dim)

        self.q_proj = nn.Linear(hidden_size, key, bias=False, device=device, dtype=dtype)
        self.k_proj = nn.Linear(hidden_size, key, bias=False, device=device, dtype=dtype)
        self.v_proj = nn.Linear(hidden_size, value, bias=False, device=device, dtype=dtype)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            parts.ShortConv(size, conv_size, bias=conv_bias, device=device, dtype=dtype) if use_short_conv else None
            for size in (key, key, value)
        )
        self.gk_proj = parts.low_rank(hidden_size, rank, key, bias=True, device=device, dtype=dtype)
        self.g_proj = nn.Linear(hidden_size, value, bias=False, device=device, dtype=dtype) if use_output_gate else None
        self.o_norm = parts.Norm(head_v_dim, eps=norm_eps, device=device, dtype=dtype)
        self.o_proj = nn.Linear(value, hidden_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        parts.reset_projections(self)

    def forward(self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """Run over sequences.

        Args:
            x: `(B, T, hidden_size)`.
            state: The state after what came before; zeros where None.
            cu_seqlens: `(N + 1,)` offsets in tokens of N sequences packed in a batch of 1.

        Returns:
            y `(B, T, hidden_size)`, and the state after the last token.

        Raises:
            TypeError, ValueError: If x, the state or the offsets have the wrong form.
        """
        recurrent, conv = self._opened(x, state, 3 if self.q_conv1d else 0)
        q, k, v, g, conv = self._inputs(x, conv, cu_seqlens)
        o, recurrent = linear_attention(q, k, v, g, initial_state=recurrent, cu_seqlens=cu_seqlens)
        gate = F.silu(parts.precise(self.g_proj(x))) if self.g_proj is not None else None
        y: Tensor = self.o_proj(self.o_norm(o, gate))
        return y, LayerState(recurrent, conv)

    def _inputs(self, x: Tensor, conv: tuple[Tensor | None, ...], cu_seqlens: Tensor | None) -> tuple[Any, ...]:
        """q, k, v and g of `functional.linear_attention`, and the states of the convolutions."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        qkv, after = parts.short_convs((self.q_conv1d, self.k_conv1d, self.v_conv1d), projected, conv, cu_seqlens)
        g = F.logsigmoid(parts.precise(self.gk_proj(x))) / self.gate_logit_normalizer
        return *(parts.heads(t, self.num_heads) for t in (*qkv, g)), after

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"{self.hidden_size}, num_heads={self.num_heads}, gate_logit_normalizer={self.gate_logit_normalizer}"
