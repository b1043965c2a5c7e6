"""DeltaProduct: a linear RNN whose state is reflected several times a token, with and without a forget gate."""

from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.linear_rnn import _layers as parts
from phyla.linear_rnn.functional import delta_product
from phyla.linear_rnn.state import LayerState
from phyla.shared import checks


class DeltaOptions(TypedDict, total=False):
    """Options with the same meaning and default in all layers that build on `DeltaProduct`."""

    num_heads: int
    head_dim: int | None
    num_v_heads: int | None
    use_short_conv: bool
    conv_size: int
    conv_bias: bool
    norm_eps: float
    device: parts.Device
    dtype: torch.dtype | None


class DeltaProduct(parts.Recurrent):
    """Linear RNN with `num_householder` Householder-like state updates a token.

    `q, k, v = silu(conv(proj x))`, `beta = sigmoid(b_proj x)`, `o = delta_product(q, k, v, beta, g)` with normalised q and k, and
    `y = o_proj(norm(o) * silu(g_proj x))`.

    Args:
        hidden_size: Input and output size.
        num_heads: Heads of the queries and keys.
        head_dim: Width K of queries and keys; `hidden_size // num_heads` by default.
        num_v_heads: Heads of the values, a multiple of `num_heads`; `num_heads` by default.
        expand_v: The values have the width `int(K * expand_v)`.
        num_householder: Reflections a token; a product of n can rotate n dimensions, so it decides which groups a layer can track.
        allow_neg_eigval: Step sizes in (0, 2) instead of (0, 1): eigenvalues of the transition in (-1, 1).
        use_forget_gate: Decay the state of each head before its reflections, by `g = -exp(A_log) softplus(a_proj x + dt_bias)`.
        use_output_gate: Multiply the normalised outputs by `silu(g_proj x)`.
        use_short_conv: A causal convolution before SiLU.
        conv_size: Width of the convolutions.
        conv_bias: Whether they have a bias.
        norm_eps: Added to the mean square in the norm.

    Shape:
        `y, state = layer(x, state)` with x and y `(B, T, hidden_size)`.

    Raises:
        TypeError, ValueError: If a size is no positive int, or the heads do not divide.

    Source: "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", section 4. exp(A_log) starts in
        U(0.001, 16): the log of the released U(0, 16) can be infinite.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        num_v_heads: int | None = None,
        expand_v: float = 1.0,
        num_householder: int = 2,
        allow_neg_eigval: bool = True,
        use_forget_gate: bool = False,
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        device: parts.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        self.num_heads = checks.positive_int("num_heads", num_heads)
        whole = parts.divided("hidden_size", hidden_size, "num_heads", num_heads) if head_dim is None else head_dim
        self.head_dim = checks.positive_int("head_dim", whole)
        self.num_v_heads = checks.positive_int("num_v_heads", num_heads if num_v_heads is None else num_v_heads)
        parts.divided("num_v_heads", self.num_v_heads, "num_heads", num_heads)
        self.head_v_dim = int(self.head_dim * checks.in_range("expand_v", expand_v, 1 / self.head_dim))
        self.num_householder = checks.positive_int("num_householder", num_householder)
        self.allow_neg_eigval = allow_neg_eigval
        self.use_forget_gate, self.use_output_gate = use_forget_gate, use_output_gate

        key, value = num_heads * self.head_dim, self.num_v_heads * self.head_v_dim
        n = self.num_householder
        self.q_proj = nn.Linear(hidden_size, key, bias=False, device=device, dtype=dtype)
        self.k_proj = nn.Linear(hidden_size, n * key, bias=False, device=device, dtype=dtype)
        self.v_proj = nn.Linear(hidden_size, n * value, bias=False, device=device, dtype=dtype)
        self.b_proj = nn.Linear(hidden_size, n * self.num_v_heads, bias=False, device=device, dtype=dtype)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            parts.ShortConv(size, conv_size, bias=conv_bias, device=device, dtype=dtype) if use_short_conv else None
            for size in (key, n * key, n * value)
        )
        self._add_gates(device, dtype)
        self.o_norm = parts.Norm(self.head_v_dim, eps=norm_eps, device=device, dtype=dtype)
        self.o_proj = nn.Linear(value, hidden_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def _add_gates(self, device: parts.Device, dtype: torch.dtype | None) -> None:
        if self.use_forget_gate:
            self.a_proj = nn.Linear(self.hidden_size, self.num_v_heads, bias=False, device=device, dtype=dtype)
            self.A_log = parts.undecayed(self.num_v_heads, device, dtype)
            self.dt_bias = parts.undecayed(self.num_v_heads, device, dtype)
        if self.use_output_gate:
            self.g_proj: nn.Module = nn.Linear(self.hidden_size, self.num_v_heads * self.head_v_dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        parts.reset_projections(self)
        if self.use_forget_gate:
            parts.reset_decay(self.A_log, self.dt_bias)

    def _log_decay(self, x: Tensor) -> Tensor | None:
        return parts.log_decay(self.a_proj(x), self.A_log, self.dt_bias) if self.use_forget_gate else None

    def _output_gate(self, x: Tensor) -> Tensor | None:
        return F.silu(parts.precise(self.g_proj(x))) if self.use_output_gate else None

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
        q, k, v, beta, g, conv = self._inputs(x, conv, cu_seqlens)
        o, recurrent = delta_product(q, k, v, beta, g, initial_state=recurrent, cu_seqlens=cu_seqlens, qk_l2norm=True)
        y: Tensor = self.o_proj(self.o_norm(o, self._output_gate(x)))
        return y, LayerState(recurrent, conv)

    def _inputs(self, x: Tensor, conv: tuple[Tensor | None, ...], cu_seqlens: Tensor | None) -> tuple[Any, ...]:
        """q, k, v, beta and g of `functional.delta_product`, and the states of the convolutions."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        (q, k, v), after = parts.short_convs((self.q_conv1d, self.k_conv1d, self.v_conv1d), projected, conv, cu_seqlens)
        if self.q_conv1d is None:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        beta = torch.sigmoid(parts.precise(self.b_proj(x)))
        k, v, beta = (parts.heads(t, self.num_householder) for t in (k, v, beta))
        q, k, v = (parts.heads(t, count) for t, count in ((q, self.num_heads), (k, self.num_heads), (v, self.num_v_heads)))
        return q, k, v, 2.0 * beta if self.allow_neg_eigval else beta, self._log_decay(x), after

    def extra_repr(self) -> str:
        """Options, for printing."""
        return (
            f"{self.hidden_size}, num_heads={self.num_heads}, head_dim={self.head_dim}, num_v_heads={self.num_v_heads}, "
            f"head_v_dim={self.head_v_dim}, num_householder={self.num_householder}, allow_neg_eigval={self.allow_neg_eigval}"
        )


class GatedDeltaProduct(DeltaProduct):
    """`DeltaProduct` with a forget gate; the arguments are the same.

    Source: "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", section 4.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        expand_v: float = 1.0,
        num_householder: int = 2,
        allow_neg_eigval: bool = True,
        use_forget_gate: bool = True,
        use_output_gate: bool = True,
        **options: Unpack[DeltaOptions],
    ) -> None:
        super().__init__(
            hidden_size,
            expand_v=expand_v,
            num_householder=num_householder,
            allow_neg_eigval=allow_neg_eigval,
            use_forget_gate=use_forget_gate,
            use_output_gate=use_output_gate,
            **options,
        )
