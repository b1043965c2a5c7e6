"""Chunks of a gated recurrence in torch: decays inside a chunk, decayed Gram matrices, read-out and the state after the chunk.

Legend: B batch, H heads, C tokens of a chunk, n rows a token, R = C n rows, K key width, V value width. All is differentiable to any
order, and no decay is ever divided by: sums of log decays over the tokens between two rows are exponentiated, so strong decays give
zeros, not NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MICRO = 16
"""Rows of a chunk with one decay a channel: there, a (rows, rows, K) tensor of decays is formed."""


class Decays(NamedTuple):
    """Decay factors of a chunk; ``channel`` tells whether the last axis is a key channel.

    Attributes:
        start: from the chunk's start to each token, (B, H, C, 1 or K); None without a gate.
        within: from token j to token i, (B, H, C, C) or (B, H, C, C, K), zero where j > i; (C, C) without a gate.
        end: from each token to the chunk's end, as ``start``.
        whole: over the chunk, (B, H, 1 or K, 1).
        channel: one decay a channel.
    """

    start: Tensor | None
    within: Tensor
    end: Tensor | None
    whole: Tensor | None
    channel: bool


def decays(g: Tensor | None, like: Tensor) -> Decays:
    """Decays of a chunk with log decays g (B, H, C, 1 or K) and queries ``like`` (B, H, C, K)."""
    size = like.shape[-2]
    if g is None:
        return Decays(None, like.new_ones(size, size).tril(), None, None, False)
    ones = torch.ones(size, size, dtype=torch.bool, device=g.device)
    # Sums over j < l <= i one by one, not differences of running sums: a decay of e^-10000 must not cost the digits of its neighbours.
    between = g.unsqueeze(-2).expand(*g.shape[:-1], size, g.shape[-1]).masked_fill(ones.triu().unsqueeze(-1), 0.0).cumsum(-3)
    within = between.masked_fill(ones.triu(1).unsqueeze(-1), -torch.inf).exp()
    start = g.cumsum(-2).exp()
    channel = g.shape[-1] > 1
    return Decays(start, within if channel else within.squeeze(-1), within[..., -1, :, :], start[..., -1:, :].mT, channel)


def before(d: Decays) -> Decays:
    """The same decays up to the moment before a token's own: rows i of ``start`` and ``within`` moved down by one."""
    if d.start is None:
        raise ValueError("g: expected a gate")
    start = torch.cat([torch.ones_like(d.start[..., :1, :]), d.start[..., :-1, :]], -2)
    rows = -3 if d.channel else -2
    within = torch.cat([torch.zeros_like(d.within.narrow(rows, 0, 1)), d.within.narrow(rows, 0, d.within.shape[rows] - 1)], rows)
    return d._replace(start=start, within=within)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """x (B, H, C n, K) times a token's factor (B, H, C, 1 or K), None for 1."""
    if factor is None:
        return x
    return x * factor.repeat_interleave(x.shape[-2] // factor.shape[-2], -2)


def gram(x: Tensor, y: Tensor, d: Decays) -> Tensor:
    """``sum_c x_ic y_jc decay_c(token of j to token of i)``, zero where j's token is later: (B, H, rows of x, rows of y)."""
    tokens = d.within.shape[-2 - d.channel]
    nx, ny = x.shape[-2] // tokens, y.shape[-2] // tokens
    if d.channel:
        within = d.within.repeat_interleave(nx, -3).repeat_interleave(ny, -2)
        return (x.unsqueeze(-2) * within * y.unsqueeze(-3)).sum(-1)
    return x @ y.mT * d.within.repeat_interleave(nx, -2).repeat_interleave(ny, -1)


def read_and_write(q: Tensor, writes: Sequence[tuple[Tensor, Tensor]], state: Tensor, d: Decays) -> tuple[Tensor, Tensor]:
    """Outputs of the chunk (B, H, C, V) and the state after it, for rows that add ``key value^T`` to the state.

    Args:
        q: scaled queries (B, H, C, K).
        writes: pairs of keys (B, H, R, K) and values (B, H, R, V).
        state: the state before the chunk, (B, H, K, V).
        d: the decays of the chunk.
    """
    out, after = times(q, d.start) @ state, state if d.whole is None else state * d.whole
    for key, value in writes:
        out = out + gram(q, key, d) @ value
        after = after + times(key, d.end).mT @ value
    return out, after
