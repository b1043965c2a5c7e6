"""Gated delta product and delta rule: states that Householder-like reflections rotate, and the matrices of these transitions."""

import torch
from torch import Tensor

from phyla.linear_rnn.functional import _chunks as chunks
from phyla.linear_rnn.functional import _sequences as sequences
from phyla.linear_rnn.functional._sequences import Mode
from phyla.shared.kernels import Kernel


def _unit(x: Tensor) -> Tensor:
    """Rows over their length, with 1e-6 under the root."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _recurrence(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, token by token: q (B, T, H, K), k (B, T, n, H, K), v (B, T, n, H, V), beta (B, T, n, H, 1), g (B, T, H, 1 or K)."""
    outs, keys, values, rates = [], k.unbind(1), v.unbind(1), beta.unbind(1)
    for t, q_t in enumerate(q.unbind(1)):
        if g is not None:
            state = state * g[:, t].exp().unsqueeze(-1)
        for key, value, rate in zip(keys[t].unbind(1), values[t].unbind(1), rates[t].unbind(1), strict=True):
            error = value - (key.unsqueeze(-2) @ state).squeeze(-2)
            state = state + key.unsqueeze(-1) * (rate * error).unsqueeze(-2)
        outs.append((q_t.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outs, 1), state


def _chunked(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Chunks of rows: a unit lower triangular system gives what each row writes, matrix products do the rest; arguments as above."""
    n = k.shape[2]
    rows = [torch.split(x.flatten(1, 2).transpose(1, 2), chunk_size * n, 2) for x in (k, v, beta)]
    queries = torch.split(q.transpose(1, 2), chunk_size, 2)
    gates = (None,) * len(queries) if g is None else torch.split(g.transpose(1, 2), chunk_size, 2)
    outs = []
    for q_c, k_c, v_c, beta_c, g_c in zip(queries, *rows, gates, strict=True):
        d = chunks.decays(g_c, q_c)
        lower = (beta_c * chunks.gram(k_c, k_c, d)).tril(-1)  # the solver takes its unit diagonal as given
        wanted = beta_c * (v_c - chunks.times(k_c, d.start) @ state)
        written = torch.linalg.solve_triangular(lower, wanted, upper=False, unitriangular=True)
        out, state = chunks.read_and_write(q_c, [(k_c, written)], state, d)
        outs.append(out)
    return torch.cat(outs, 2).transpose(1, 2), state


def _batched(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, scale: float, qk_l2norm: bool, chunk_size: int
) -> tuple[Tensor, Tensor]:
    if qk_l2norm:
        q, k = _unit(q), _unit(k)
    heads = v.shape[-2]
    q, k, beta = sequences.value_heads(q * scale, heads), sequences.value_heads(k, heads), beta.unsqueeze(-1)
    if g is not None and g.dim() == 3:
        g = g.unsqueeze(-1)
    if state is None:
        state = v.new_zeros(q.shape[0], heads, q.shape[-1], v.shape[-1])
    if chunk_size == 0 or q.shape[1] == 1:
        return _recurrence(q, k, v, beta, g, state)
    return _chunked(q, k, v, beta, g, state, chunk_size)


def _composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    return sequences.over_sequences(_batched, cu_seqlens, (q, k, v, beta, g), initial_state, scale, qk_l2norm, chunk_size)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *options: object,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, width = v.shape[0], v.shape[1], v.shape[3], v.shape[4]
    return v.new_empty(batch, tokens, heads, width), v.new_empty(sequences.sequences_of(q, cu_seqlens), heads, q.shape[-1], width)


_delta_product = Kernel(
    "phyla_linear_rnn::delta_product(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, bool qk_l2norm, int chunk_size) -> (Tensor, Tensor)",
    _composite,
    differentiable=("q", "k", "v", "beta", "g", "initial_state"),
    fake=_fake,
)


def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    chunk_size: int | None = None,
    mode: Mode = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Linear recurrence whose state is decayed once and reflected ``n`` times a token.

    For each token ``S <- Diag(e^g) S``, then for j = 1..n ``S <- S + beta_j k_j (v_j - S^T k_j)^T``, then ``o = scale S^T q``. With
    unit keys each step has the eigenvalue ``1 - beta_j`` along ``k_j`` and 1 elsewhere. Keys are used as they are given: long ones can
    make the state grow.

    Args:
        q: Queries (B, T, H, K).
        k: Keys (B, T, n, H, K); a flat (B, T n, H, K) tensor is one ``view`` away.
        v: Values (B, T, n, HV, V), HV a multiple of H; value head h reads key head ``h // (HV // H)``.
        beta: Step sizes (B, T, n, HV), in (0, 2) for contractions.
        g: Log decays, one a head (B, T, HV) or one a key channel (B, T, HV, K); None for no decay.
        scale: Factor of the read-out; K^-1/2 where None.
        initial_state: (N, HV, K, V); zeros where None.
        cu_seqlens: (N + 1,) offsets in tokens of N sequences packed in a batch of 1; N = B without it.
        qk_l2norm: Divide queries and keys by ``sqrt(sum x^2 + 1e-6)``.
        chunk_size: Tokens of a chunk of the torch path; at most 16 rows are taken together with one decay a channel.
        mode: "auto" is the fastest path; "recurrent" and "chunk" are the torch paths, token by token and chunk by chunk. All agree to
            rounding.

    Returns:
        Outputs (B, T, HV, V) in the dtype of ``v``, and the final states (N, HV, K, V), in float64 if an argument is, else in float32.

    Raises:
        TypeError: If an argument is no tensor of the right kind.
        ValueError: If shapes or devices disagree, T is 0, or an option is out of its range.

    Source: "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", equations of section 3.
    """
    batch, tokens, query_heads, width = sequences.expect_queries(q).shape
    sequences.expect("k", k, (batch, tokens, "n", query_heads, width), "q", q.device)
    n = k.shape[2]
    sequences.expect("v", v, (batch, tokens, n, "HV", "V"), "q and k", q.device)
    heads = v.shape[3]
    sequences.expect_heads("v", heads, query_heads)
    sequences.expect("beta", beta, (batch, tokens, n, heads), "v", q.device)
    if g is not None:
        sequences.expect_gate(g, q, heads)
    cu_seqlens = sequences.expect_packing(cu_seqlens, q)
    sequences.expect_state("initial_state", initial_state, q, cu_seqlens, (heads, width, v.shape[4]))
    channel = g is not None and g.dim() == 4
    size = sequences.expect_mode(mode, chunk_size, max(1, 64 // n))
    size = min(size, max(1, chunks.MICRO // n)) if channel else size
    options = (cu_seqlens, sequences.expect_scale(scale, width), bool(qk_l2norm), size)
    run = _delta_product if mode == "auto" else _delta_product.plain
    out, state = run(*sequences.promoted(q, k, v, beta, g, initial_state), *options)
    return sequences.as_dtype(out, v.dtype), state


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    chunk_size: int | None = None,
    mode: Mode = "auto",
) -> tuple[Tensor, Tensor]:
    r"""`delta_product` with one step a token: ``S <- Diag(e^g) S``, ``S <- S + beta k (v - S^T k)^T``, ``o = scale S^T q``.

    Args:
        q: Queries (B, T, H, K).
        k: Keys (B, T, H, K).
        v: Values (B, T, HV, V), HV a multiple of H.
        beta: Step sizes (B, T, HV).
        g: Log decays (B, T, HV) or (B, T, HV, K); None for no decay.
        scale: As in `delta_product`.
        initial_state: As in `delta_product`.
        cu_seqlens: As in `delta_product`.
        qk_l2norm: As in `delta_product`.
        chunk_size: As in `delta_product`.
        mode: As in `delta_product`.

    Returns:
        Outputs (B, T, HV, V) and the final states (N, HV, K, V).

    Raises:
        TypeError, ValueError: As in `delta_product`.

    Source: "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (g None), "Gated Delta Networks" (a decay a head),
    "Kimi Linear" (a decay a channel).
    """
    batch, tokens, query_heads, width = sequences.expect_queries(q).shape
    sequences.expect("k", k, (batch, tokens, query_heads, width), "q", q.device)
    sequences.expect("v", v, (batch, tokens, "HV", "V"), "q", q.device)
    sequences.expect_heads("v", v.shape[2], query_heads)
    sequences.expect("beta", beta, (batch, tokens, v.shape[2]), "v", q.device)
    return delta_product(
        q,
        k.unsqueeze(2),
        v.unsqueeze(2),
        beta.unsqueeze(2),
        g,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        mode=mode,
    )


def transition_matrices(k: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
    """The matrix by which `delta_product` multiplies the state at each token.

    ``(I - beta_n k_n k_n^T) .. (I - beta_1 k_1 k_1^T) Diag(e^g)``.

    Args:
        k: Keys (B, T, n, H, K).
        beta: Step sizes (B, T, n, H).
        g: Log decays (B, T, H) or (B, T, H, K); None for no decay.

    Returns:
        Matrices (B, T, H, K, K), in float64 if an argument is, else in float32.

    Raises:
        TypeError: If an argument is no floating tensor.
        ValueError: If shapes or devices disagree.

    Source: "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", section 3.
    """
    batch, tokens, n, heads, width = sequences.expect("k", k, ("B", "T", "n", "H", "K")).shape
    sequences.expect("beta", beta, (batch, tokens, n, heads), "k", k.device)
    if g is not None:
        sequences.expect_gate(g, k[:, :, 0], heads)
    dtype = sequences.accumulation_dtype(k, beta, g)
    keys, rates, decay = k.to(dtype), beta.to(dtype), None if g is None else g.to(dtype)
    result = torch.eye(width, dtype=dtype, device=k.device).expand(batch, tokens, heads, width, width)
    if decay is not None:
        result = result * (decay if decay.dim() == 4 else decay.unsqueeze(-1)).exp().unsqueeze(-2)
    for key, rate in zip(keys.unbind(2), rates.unbind(2), strict=True):
        result = result - (rate.unsqueeze(-1) * key).unsqueeze(-1) * (key.unsqueeze(-2) @ result)
    return result
