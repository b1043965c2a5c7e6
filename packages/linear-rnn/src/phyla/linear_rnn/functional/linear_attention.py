"""Linear attention with no, one, or a channel-wise decay: GLA, Mamba-2, retention."""

import torch
from torch import Tensor

from phyla.linear_rnn.functional import _chunks as chunks
from phyla.linear_rnn.functional import _sequences as sequences
from phyla.linear_rnn.functional._sequences import Mode
from phyla.shared.kernels import Kernel


def _recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, token by token: q, k (B, T, H, K), v (B, T, H, V), g (B, T, H, 1 or K)."""
    outs, keys, values = [], k.unbind(1), v.unbind(1)
    for t, q_t in enumerate(q.unbind(1)):
        if g is not None:
            state = state * g[:, t].exp().unsqueeze(-1)
        state = state + keys[t].unsqueeze(-1) * values[t].unsqueeze(-2)
        outs.append((q_t.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outs, 1), state


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Chunk by chunk; arguments as above."""
    rows = [torch.split(x.transpose(1, 2), chunk_size, 2) for x in (q, k, v)]
    gates = (None,) * len(rows[0]) if g is None else torch.split(g.transpose(1, 2), chunk_size, 2)
    outs = []
    for q_c, k_c, v_c, g_c in zip(*rows, gates, strict=True):
        out, state = chunks.read_and_write(q_c, [(k_c, v_c)], state, chunks.decays(g_c, q_c))
        outs.append(out)
    return torch.cat(outs, 2).transpose(1, 2), state


def _batched(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    heads = v.shape[-2]
    q, k = sequences.value_heads(q * scale, heads), sequences.value_heads(k, heads)
    if g is not None and g.dim() == 3:
        g = g.unsqueeze(-1)
    if state is None:
        state = v.new_zeros(q.shape[0], heads, q.shape[-1], v.shape[-1])
    if chunk_size == 0 or q.shape[1] == 1:
        return _recurrence(q, k, v, g, state)
    return _chunked(q, k, v, g, state, chunk_size)


def _composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    return sequences.over_sequences(_batched, cu_seqlens, (q, k, v, g), initial_state, scale, chunk_size)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, *options: object
) -> tuple[Tensor, Tensor]:
    heads, width = v.shape[2:]
    return torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty(
        sequences.sequences_of(q, cu_seqlens), heads, q.shape[-1], width
    )


_linear_attention = Kernel(
    "phyla_linear_rnn::linear_attention(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, int chunk_size) -> (Tensor, Tensor)",
    _composite,
    differentiable=("q", "k", "v", "g", "initial_state"),
    fake=_fake,
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    mode: Mode = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Linear attention: ``S <- Diag(e^g) S + k v^T``, ``o = scale S^T q``.

    Mamba-2 is ``linear_attention(C, B, dt x, -exp(A_log) dt, scale=1)``.

    Args:
        q: Queries (B, T, H, K).
        k: Keys (B, T, H, K).
        v: Values (B, T, HV, V), HV a multiple of H; value head h reads key head ``h // (HV // H)``.
        g: Log decays, one a head (B, T, HV) or one a key channel (B, T, HV, K); None for no decay.
        scale: Factor of the read-out; K^-1/2 where None.
        initial_state: (N, HV, K, V); zeros where None.
        cu_seqlens: (N + 1,) offsets in tokens of N sequences packed in a batch of 1; N = B without it.
        chunk_size: Tokens of a chunk of the torch path; at most 16 with one decay a channel.
        mode: "auto" is the fastest path; "recurrent" and "chunk" are the torch paths, token by token and chunk by chunk. All agree to
            rounding.

    Returns:
        Outputs (B, T, HV, V) in the dtype of ``v``, and the final states (N, HV, K, V), in float64 if an argument is, else in float32.

    Raises:
        TypeError: If an argument is no tensor of the right kind.
        ValueError: If shapes or devices disagree, T is 0, or an option is out of its range.

    Source: "Gated Linear Attention Transformers", section 4 (a decay a channel); "Transformers are SSMs", section 6 (a decay a head).
    """
    batch, tokens, query_heads, width = sequences.expect_queries(q).shape
    sequences.expect("k", k, (batch, tokens, query_heads, width), "q", q.device)
    sequences.expect("v", v, (batch, tokens, "HV", "V"), "q", q.device)
    heads = v.shape[2]
    sequences.expect_heads("v", heads, query_heads)
    if g is not None:
        sequences.expect_gate(g, q, heads)
    cu_seqlens = sequences.expect_packing(cu_seqlens, q)
    sequences.expect_state("initial_state", initial_state, q, cu_seqlens, (heads, width, v.shape[3]))
    size = sequences.expect_mode(mode, chunk_size, 64)
    size = min(size, chunks.MICRO) if g is not None and g.dim() == 4 else size
    run = _linear_attention if mode == "auto" else _linear_attention.plain
    options = (cu_seqlens, sequences.expect_scale(scale, width), size)
    out, state = run(*sequences.promoted(q, k, v, g, initial_state), *options)
    return sequences.as_dtype(out, v.dtype), state
