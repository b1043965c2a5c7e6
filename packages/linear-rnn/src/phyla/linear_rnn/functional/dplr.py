"""Diagonal plus low rank recurrence: the transition of RWKV-7."""

import torch
from torch import Tensor

from phyla.linear_rnn.functional import _chunks as chunks
from phyla.linear_rnn.functional import _sequences as sequences
from phyla.linear_rnn.functional._sequences import Mode
from phyla.shared.kernels import Kernel


def _recurrence(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, token by token: all (B, T, H, K) but v (B, T, H, V)."""
    outs = []
    for q_t, k_t, v_t, a_t, b_t, g_t in zip(*(x.unbind(1) for x in (q, k, v, a, b, g)), strict=True):
        removed = a_t.unsqueeze(-2) @ state  # a reads the state before the decay
        state = state * g_t.exp().unsqueeze(-1) + b_t.unsqueeze(-1) * removed + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outs.append((q_t.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outs, 1), state


def _chunked(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: a unit lower triangular system gives what each token reads by ``a``; arguments as above."""
    outs = []
    for q_c, k_c, v_c, a_c, b_c, g_c in zip(*(torch.split(x.transpose(1, 2), chunk_size, 2) for x in (q, k, v, a, b, g)), strict=True):
        d = chunks.decays(g_c, q_c)
        earlier = chunks.before(d)
        lower = -chunks.gram(a_c, b_c, earlier)
        wanted = chunks.gram(a_c, k_c, earlier) @ v_c + chunks.times(a_c, earlier.start) @ state
        read = torch.linalg.solve_triangular(lower, wanted, upper=False, unitriangular=True)
        out, state = chunks.read_and_write(q_c, [(k_c, v_c), (b_c, read)], state, d)
        outs.append(out)
    return torch.cat(outs, 2).transpose(1, 2), state


def _batched(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, state: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    if state is None:
        state = v.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if chunk_size == 0 or q.shape[1] == 1:
        return _recurrence(q * scale, k, v, a, b, g, state)
    return _chunked(q * scale, k, v, a, b, g, state, chunk_size)


def _composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    return sequences.over_sequences(_batched, cu_seqlens, (q, k, v, a, b, g), initial_state, scale, chunk_size)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *options: object,
) -> tuple[Tensor, Tensor]:
    state = v.new_empty(sequences.sequences_of(q, cu_seqlens), q.shape[2], q.shape[3], v.shape[3])
    return torch.empty_like(v, memory_format=torch.contiguous_format), state


_dplr = Kernel(
    "phyla_linear_rnn::dplr(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor g, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, int chunk_size) -> (Tensor, Tensor)",
    _composite,
    differentiable=("q", "k", "v", "a", "b", "g", "initial_state"),
    fake=_fake,
)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    mode: Mode = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Linear recurrence with a diagonal plus rank-one transition: ``S <- Diag(e^g) S + b (S^T a)^T + k v^T``, ``o = scale S^T q``.

    ``a`` reads the state before the decay. RWKV-7 passes ``a = -kappa``, ``b = kappa alpha`` and ``scale=1``; the delta rule is
    ``a = e^g k``, ``b = -beta k`` with values ``beta v``.

    Args:
        q: Queries (B, T, H, K).
        k: Keys (B, T, H, K).
        v: Values (B, T, H, V).
        a: Removal keys (B, T, H, K).
        b: What the removal writes (B, T, H, K).
        g: Log decays (B, T, H, K).
        scale: Factor of the read-out; K^-1/2 where None.
        initial_state: (N, H, K, V); zeros where None.
        cu_seqlens: (N + 1,) offsets in tokens of N sequences packed in a batch of 1; N = B without it.
        chunk_size: Tokens of a chunk of the torch path, at most 16.
        mode: "auto" is the fastest path; "recurrent" and "chunk" are the torch paths, token by token and chunk by chunk. All agree to
            rounding.

    Returns:
        Outputs (B, T, H, V) in the dtype of ``v``, and the final states (N, H, K, V), in float64 if an argument is, else in float32.

    Raises:
        TypeError: If an argument is no tensor of the right kind.
        ValueError: If shapes or devices disagree, T is 0, or an option is out of its range.

    Source: 'RWKV-7 "Goose"', section 3.
    """
    batch, tokens, heads, width = sequences.expect_queries(q).shape
    for name, x in (("k", k), ("a", a), ("b", b)):
        sequences.expect(name, x, (batch, tokens, heads, width), "q", q.device)
    sequences.expect("v", v, (batch, tokens, heads, "V"), "q", q.device)
    sequences.expect_gate(g, q, heads, scalar=False)
    cu_seqlens = sequences.expect_packing(cu_seqlens, q)
    sequences.expect_state("initial_state", initial_state, q, cu_seqlens, (heads, width, v.shape[3]))
    size = min(sequences.expect_mode(mode, chunk_size, chunks.MICRO), chunks.MICRO)
    run = _dplr if mode == "auto" else _dplr.plain
    out, state = run(*sequences.promoted(q, k, v, a, b, g, initial_state), cu_seqlens, sequences.expect_scale(scale, width), size)
    return sequences.as_dtype(out, v.dtype), state
