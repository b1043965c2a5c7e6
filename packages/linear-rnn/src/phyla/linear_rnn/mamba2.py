"""Mamba-2: a state space layer whose transition is a scalar for each head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.linear_rnn import _layers as parts
from phyla.linear_rnn.functional import linear_attention
from phyla.linear_rnn.state import LayerState
from phyla.shared import checks


class Mamba2(parts.Recurrent):
    """Selective state space layer in its dual form, linear attention with queries C, keys B and values dt x.

    `[z, xBC, dt] = in_proj x`; `[x, B, C] = silu(conv1d(xBC))`; `dt = softplus(dt + dt_bias)`;
    `y = linear_attention(C, B, dt x, -exp(A_log) dt) + D x`; the output is `out_proj(norm(y * silu(z)))`, the gate before the norm.

    Args:
        hidden_size: Input and output size.
        state_size: Width N of B and C.
        head_dim: Width of a value head.
        expand: The inner size is `expand * hidden_size`.
        num_groups: Groups of heads with a B and a C of their own.
        conv_size: Width of the convolution.
        norm_eps: Added to the mean square in the norm.

    Shape:
        `y, state = layer(x, state)` with x and y `(B, T, hidden_size)`.

    Raises:
        TypeError, ValueError: If a size is no positive int, or the heads or groups do not divide.

    Source: "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality", section 8.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        num_groups: int = 1,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        device: parts.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        inner = checks.positive_int("expand", expand) * hidden_size
        self.num_heads = parts.divided("expand * hidden_size", inner, "head_dim", checks.positive_int("head_dim", head_dim))
        self.num_groups = checks.positive_int("num_groups", num_groups)
        parts.divided("the number of heads", self.num_heads, "num_groups", num_groups)
        self._sizes = (inner, num_groups * checks.positive_int("state_size", state_size))
        mixed = inner + 2 * self._sizes[1]

        self.in_proj = nn.Linear(hidden_size, inner + mixed + self.num_heads, bias=False, device=device, dtype=dtype)
        self.conv1d = parts.ShortConv(mixed, conv_size, bias=True, device=device, dtype=dtype)
        self.dt_bias, self.A_log, self.D = (parts.undecayed(self.num_heads, device, dtype) for _ in range(3))
        self.norm = parts.Norm(inner, eps=norm_eps, device=device, dtype=dtype)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        parts.reset_projections(self)
        parts.reset_decay(self.A_log, self.dt_bias, low=1.0)
        nn.init.ones_(self.D)

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
        recurrent, conv = self._opened(x, state, 1)
        q, k, values, dt, z, after = self._inputs(x, conv, cu_seqlens)
        decay = -parts.precise(self.A_log).exp() * dt
        v = values * dt.unsqueeze(-1)
        o, recurrent = linear_attention(q, k, v, decay, scale=1.0, initial_state=recurrent, cu_seqlens=cu_seqlens)
        o = (o + self.D.unsqueeze(-1) * values).flatten(-2) * F.silu(parts.precise(z))
        y: Tensor = self.out_proj(self.norm(o.unsqueeze(-2)).to(x.dtype))
        return y, LayerState(recurrent, after)

    def _inputs(self, x: Tensor, conv: tuple[Tensor | None, ...], cu_seqlens: Tensor | None) -> tuple[Any, ...]:
        """C, B, x and dt by heads, the output gate z, and the state of the convolution."""
        inner, keys = self._sizes
        z, mixed, dt = torch.split(self.in_proj(x), [inner, inner + 2 * keys, self.num_heads], -1)
        (mixed,), after = parts.short_convs((self.conv1d,), (mixed,), conv, cu_seqlens)
        values, B, C = torch.split(mixed, [inner, keys, keys], -1)
        dt = F.softplus(parts.precise(dt) + parts.precise(self.dt_bias))
        return parts.heads(C, self.num_groups), parts.heads(B, self.num_groups), parts.heads(values, self.num_heads), dt, z, after

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"{self.hidden_size}, num_heads={self.num_heads}, num_groups={self.num_groups}"
