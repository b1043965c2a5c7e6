"""The recurrences straight from their equations, in float64, one sequence, one head and one token at a time."""

import itertools

import torch
from torch import Tensor


def _of_heads(step, q, v, initial_state, cu_seqlens):
    """Run ``step(state, t, sequence, head) -> state, out`` over the tokens of every sequence and head."""
    batch, tokens, _, width = q.shape
    heads, value_width = v.shape[-2:]
    spans = [(b, 0, tokens) for b in range(batch)] if cu_seqlens is None else []
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        spans = [(0, begin, end) for begin, end in itertools.pairwise(offsets)]
    zeros = torch.zeros(width, value_width, dtype=torch.float64)
    outs, states = [[] for _ in range(heads)], []
    for n, (b, begin, end) in enumerate(spans):
        for h in range(heads):
            state = zeros if initial_state is None else initial_state[n, h].double()
            for t in range(begin, end):
                state, out = step(state, b, t, h)
                outs[h].append(out)
            states.append(state)
    out = torch.stack([torch.stack(o) for o in outs], 1)
    return out.view(batch, tokens, heads, value_width), torch.stack(states).view(len(spans), heads, width, value_width)


def _doubles(*tensors):
    return [None if t is None else t.double() for t in tensors]


def delta_product(q, k, v, beta, g=None, *, scale=None, initial_state=None, cu_seqlens=None, qk_l2norm=False) -> tuple[Tensor, Tensor]:
    q, k, v, beta, g = _doubles(q, k, v, beta, g)
    if qk_l2norm:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    group = v.shape[-2] // q.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def step(state, b, t, h):
        if g is not None:
            state = torch.diag(g[b, t, h].expand(q.shape[-1]).exp()) @ state
        for j in range(k.shape[2]):
            key = k[b, t, j, h // group]
            state = state + beta[b, t, j, h] * torch.outer(key, v[b, t, j, h] - state.T @ key)
        return state, scale * state.T @ q[b, t, h // group]

    return _of_heads(step, q, v, initial_state, cu_seqlens)


def delta_rule(q, k, v, beta, g=None, **options) -> tuple[Tensor, Tensor]:
    return delta_product(q, k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2), g, **options)


def linear_attention(q, k, v, g=None, *, scale=None, initial_state=None, cu_seqlens=None) -> tuple[Tensor, Tensor]:
    q, k, v, g = _doubles(q, k, v, g)
    group = v.shape[-2] // q.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def step(state, b, t, h):
        if g is not None:
            state = torch.diag(g[b, t, h].expand(q.shape[-1]).exp()) @ state
        state = state + torch.outer(k[b, t, h // group], v[b, t, h])
        return state, scale * state.T @ q[b, t, h // group]

    return _of_heads(step, q, v, initial_state, cu_seqlens)


def dplr(q, k, v, a, b, g, *, scale=None, initial_state=None, cu_seqlens=None) -> tuple[Tensor, Tensor]:
    q, k, v, a, b, g = _doubles(q, k, v, a, b, g)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def step(state, s, t, h):
        removed = torch.outer(b[s, t, h], state.T @ a[s, t, h])
        state = torch.diag(g[s, t, h].exp()) @ state + removed + torch.outer(k[s, t, h], v[s, t, h])
        return state, scale * state.T @ q[s, t, h]

    return _of_heads(step, q, v, initial_state, cu_seqlens)
