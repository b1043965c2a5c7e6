"""Kimi Delta Attention: the gated delta rule with one decay for each key channel."""

from typing import Unpack

import torch
from torch import Tensor

from phyla.linear_rnn import _layers as parts
from phyla.linear_rnn.delta_product import DeltaOptions, DeltaProduct


class KimiDeltaAttention(DeltaProduct):
    """Gated delta rule whose decay is drawn for each key channel, with a sigmoid output gate.

    As `GatedDeltaNet` with `g = -exp(A_log) softplus(f_proj x + dt_bias)` of shape (B, T, HV, K), where `f_proj` and the gate `g_proj` go
    through the width of a value head.

    Args: those of `DeltaProduct`, but for `num_householder` and the gates, which are always there.

    Source: "Kimi Linear: An Expressive, Efficient Attention Architecture", section 4.
    """

    def __init__(self, hidden_size: int, *, expand_v: float = 1.0, allow_neg_eigval: bool = False, **options: Unpack[DeltaOptions]) -> None:
        super().__init__(
            hidden_size,
            expand_v=expand_v,
            num_householder=1,
            allow_neg_eigval=allow_neg_eigval,
            use_forget_gate=True,
            use_output_gate=True,
            **options,
        )

    def _add_gates(self, device: parts.Device, dtype: torch.dtype | None) -> None:
        key, value = self.num_v_heads * self.head_dim, self.num_v_heads * self.head_v_dim
        self.f_proj = parts.low_rank(self.hidden_size, self.head_v_dim, key, bias=False, device=device, dtype=dtype)
        self.A_log = parts.undecayed(self.num_v_heads, device, dtype)
        self.dt_bias = parts.undecayed(key, device, dtype)
        self.g_proj = parts.low_rank(self.hidden_size, self.head_v_dim, value, bias=True, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        parts.reset_projections(self)
        parts.reset_decay(self.A_log, self.dt_bias, low=1.0)

    def _log_decay(self, x: Tensor) -> Tensor:
        rate, bias = (parts.heads(t, self.num_v_heads) for t in (self.f_proj(x), self.dt_bias))
        return parts.log_decay(rate, self.A_log.unsqueeze(-1), bias)

    def _output_gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(parts.precise(self.g_proj(x)))
