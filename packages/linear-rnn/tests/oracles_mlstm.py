"""The mLSTM token by token and the convolution sequence by sequence, straight from their equations, in the dtype that they are given."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mlstm_oracle(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c: Tensor, n: Tensor, m: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes (B, T, H, K), (B, T, H, V), (B, T, H); states (B, H, K, V), (B, H, K), (B, H)."""
    outs = []
    for t in range(q.shape[1]):
        l = F.logsigmoid(f[:, t])
        before, m = m, torch.maximum(l + m, i[:, t])
        fa, ia = torch.exp(l + before - m), torch.exp(i[:, t] - m)
        c = fa[..., None, None] * c + ia[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        n = fa[..., None] * n + ia[..., None] * k[:, t]
        top = scale * torch.einsum("bhkv,bhk->bhv", c, q[:, t])
        bottom = torch.maximum((scale * (n * q[:, t]).sum(-1)).abs(), torch.exp(-m)) + eps
        outs.append(top / bottom.unsqueeze(-1))
    return torch.stack(outs, 1), c, n, m


def conv_oracle(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """torch's grouped convolution of the inputs behind their state, (B, T, D) and (B, W - 1, D)."""
    extended = torch.cat([state, x], 1)
    y = F.conv1d(extended.mT, weight.unsqueeze(1), bias, groups=x.shape[2]).mT
    return F.silu(y) if silu else y, extended[:, x.shape[1] :]


def separately(function, lengths, packed, states):
    """``function(sequence tensors.., state tensors..)`` on each packed sequence alone; outputs packed again, states stacked."""
    outs, finals, start = [], [], 0
    for j, length in enumerate(lengths):
        own = [s[j : j + 1] for s in states]
        if length:
            out, *own = function(*(x[:, start : start + length] for x in packed), *own)
            outs.append(out)
        finals.append(own)
        start += length
    return torch.cat(outs, 1), *(torch.cat(parts) for parts in zip(*finals, strict=True))
