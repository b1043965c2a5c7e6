"""mLSTM layer of xLSTM: up-projection, convolution, matrix memory, down-projection."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.linear_rnn import _layers as parts
from phyla.linear_rnn.functional import mlstm
from phyla.linear_rnn.state import LayerState
from phyla.shared import checks


class BlockDiagonal(nn.Module):
    """Linear map of consecutive blocks of channels, each by a matrix of its own: `weight` (blocks, out, in)."""

    def __init__(self, size: int, block: int, *, device: parts.Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size // block, block, block, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size)."""
        # Blocks of a few channels are joined to blocks of up to 64, mostly zeros, which matrix products run through much faster.
        blocks, _, inner = self.weight.shape
        joined = max(j for j in range(1, max(64 // inner, 1) + 1) if blocks % j == 0)
        own = torch.eye(joined, device=x.device, dtype=self.weight.dtype)[:, None, :, None]
        weight = (torch.unflatten(self.weight, 0, (-1, joined)).unsqueeze(-2) * own).flatten(-2).flatten(1, 2)
        grouped = parts.heads(x, blocks // joined).flatten(0, -3).transpose(0, 1)
        return (grouped @ weight.mT).transpose(0, 1).reshape(x.shape)


class MLSTM(parts.Recurrent):
    """Matrix-memory LSTM layer, with an inner size of `expand * hidden_size` rounded up to a multiple of 64.

    `[u, z] = proj_up x`; `c = silu(conv1d(u))`; q and k are block-diagonal maps of c, v of u; the gates are linear in [q, k, v];
    `y = proj_down((layer_norm(mlstm(q, k, v, i, f)) + learnable_skip * c) * silu(z))`.

    Args:
        hidden_size: Input and output size.
        num_heads: Heads of the memory.
        expand: Inner size over `hidden_size`.
        qkv_block_size: Channels of a block of the projections to q, k and v.
        conv_size: Width of the convolution.
        num_layers: Layers of the stack, by which the weights of `proj_down` start smaller.
        norm_eps: Added to the variance in the norm of each head.

    Shape:
        `y, state = layer(x, state)` with x and y `(B, T, hidden_size)`.

    Raises:
        TypeError, ValueError: If a size is no positive int, or heads or blocks do not divide the inner size.

    Source: "xLSTM: Extended Long Short-Term Memory", section 2.3 and figure 11.
    """

    keeps_init = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        expand: float = 2.0,
        qkv_block_size: int = 4,
        conv_size: int = 4,
        num_layers: int = 1,
        norm_eps: float = 1e-5,
        device: parts.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        inner = 64 * math.ceil(checks.in_range("expand", expand, 0.0, low_open=True) * hidden_size / 64)
        self.num_heads = checks.positive_int("num_heads", num_heads)
        parts.divided("the inner size", inner, "num_heads", num_heads)
        parts.divided("the inner size", inner, "qkv_block_size", checks.positive_int("qkv_block_size", qkv_block_size))
        self.num_layers = checks.positive_int("num_layers", num_layers)
        self.norm_eps = checks.in_range("norm_eps", norm_eps, 0.0)

        self.proj_up = nn.Linear(hidden_size, 2 * inner, bias=False, device=device, dtype=dtype)
        self.q_proj, self.k_proj, self.v_proj = (BlockDiagonal(inner, qkv_block_size, device=device, dtype=dtype) for _ in range(3))
        self.conv1d = parts.ShortConv(inner, conv_size, bias=True, device=device, dtype=dtype)
        self.igate, self.fgate = (nn.Linear(3 * inner, num_heads, device=device, dtype=dtype) for _ in range(2))
        self.outnorm = parts.HeadLayerNorm(inner, eps=self.norm_eps, bias=False, device=device, dtype=dtype)
        self.learnable_skip = nn.Parameter(torch.empty(inner, device=device, dtype=dtype))
        self.proj_down = nn.Linear(inner, hidden_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew; the forget gates start between almost open and open."""
        self.conv1d.reset_parameters()
        for projection in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=math.sqrt(2.0 / (5.0 * self.hidden_size)))
        nn.init.normal_(self.proj_down.weight, std=2.0 / (self.num_layers * math.sqrt(self.hidden_size)))
        for gate in (self.igate, self.fgate):
            nn.init.zeros_(gate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        self.fgate.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))
        nn.init.ones_(self.outnorm.weight)
        nn.init.ones_(self.learnable_skip)

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
        u, z = self.proj_up(x).chunk(2, -1)
        (c,), after = parts.short_convs((self.conv1d,), (u,), conv, cu_seqlens)
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(u)
        gates = torch.cat([q, k, v], -1)
        q, k, v = (parts.heads(t, self.num_heads) for t in (q, k, v))
        o, memory = mlstm(q, k, v, self.igate(gates), self.fgate(gates), initial_state=recurrent, cu_seqlens=cu_seqlens)
        y: Tensor = self.proj_down(((self.outnorm(o) + self.learnable_skip * c) * F.silu(z)).to(c.dtype))
        return y, LayerState(memory, after)

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"{self.hidden_size}, num_heads={self.num_heads}, norm_eps={self.norm_eps}"
