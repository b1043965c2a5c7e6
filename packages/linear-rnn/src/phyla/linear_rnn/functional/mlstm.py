"""mLSTM: a matrix memory with exponential input gate, sigmoid forget gate, normaliser and stabiliser."""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.linear_rnn.functional import _sequences as sequences
from phyla.linear_rnn.functional._sequences import Mode
from phyla.shared import checks
from phyla.shared.kernels import Kernel

# Inside, the normaliser n is a further column of the memory c, written by a value that is always 1: memory (B, H, K, V + 1).


class MLSTMState(NamedTuple):
    """Memory ``c`` (N, H, K, V), normaliser ``n`` (N, H, K) and stabiliser ``m`` (N, H): the true memory is ``e^m c``."""

    c: Tensor
    n: Tensor
    m: Tensor


def _read(numerator: Tensor, m: Tensor, eps: float) -> Tensor:
    """Output from ``scale q^T memory`` (..., V + 1)."""
    # Where e^-m nears the largest float the output is 0, and so must its gradient be.
    floor = (-m).clamp(max=math.log(torch.finfo(m.dtype).max) - 1.0).exp()
    return numerator[..., :-1] / (torch.maximum(numerator[..., -1].abs(), floor) + eps).unsqueeze(-1)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, memory: Tensor, m: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, token by token: q, k (B, T, H, K), v (B, T, H, V + 1), i, log_f (B, T, H)."""
    outs = []
    for q_t, k_t, v_t, i_t, f_t in zip(*(x.unbind(1) for x in (q, k, v, i, log_f)), strict=True):
        before, m = m, torch.maximum(f_t + m, i_t)
        forget, write = (f_t + before - m).exp(), (i_t - m).exp()
        memory = forget[..., None, None] * memory + (write.unsqueeze(-1) * k_t).unsqueeze(-1) * v_t.unsqueeze(-2)
        outs.append(_read((q_t.unsqueeze(-2) @ memory).squeeze(-2), m, eps))
    return torch.stack(outs, 1), memory, m


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, memory: Tensor, m: Tensor, eps: float, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All chunks side by side as matrix products; only the stabiliser and the memory go from chunk to chunk."""
    tokens = q.shape[1]
    q, k, v, i, log_f = (
        torch.unflatten(F.pad(x, (0, 0) * (x.dim() - 2) + (0, -tokens % size), value=fill), 1, (-1, size)).movedim(3, 1)
        for x, fill in ((q, 0.0), (k, 0.0), (v, 0.0), (i, -torch.inf), (log_f, 0.0))
    )  # (B, H, chunks, size, ...)
    earlier = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
    # Log weight of token j at token t >= j: i_j + sum of log_f over j < s <= t. Sums one by one, not differences of running sums: a
    # forget gate of e^-10000 must not cost the digits of its neighbours.
    log_weight = log_f.unsqueeze(-1).expand(*log_f.shape, size).masked_fill(~earlier, 0.0).cumsum(-2) + i.unsqueeze(-2)
    log_weight = log_weight.masked_fill(earlier.mT, -torch.inf)
    total = log_f.cumsum(-1)

    highest, starts = log_weight.amax(-1), [m]
    for total_c, highest_c in zip(total[..., -1].unbind(-1), highest[..., -1].unbind(-1), strict=True):
        starts.append(torch.maximum(total_c + starts[-1], highest_c))
    total = total + torch.stack(starts[:-1], -1).unsqueeze(-1)
    m_t = torch.maximum(total, highest)
    weight, carried = (log_weight - m_t.unsqueeze(-1)).exp(), (total - m_t).exp()

    written = (k * weight[..., -1, :].unsqueeze(-1)).mT @ v
    memories = [memory]
    for written_c, carried_c in zip(written.unbind(2), carried[..., -1].unbind(-1), strict=True):
        memories.append(carried_c[..., None, None] * memories[-1] + written_c)
    numerator = (q @ k.mT * weight) @ v + carried.unsqueeze(-1) * (q @ torch.stack(memories[:-1], 2))
    out = _read(numerator, m_t, eps).movedim(1, 3).flatten(1, 2)[:, :tokens]
    return out, memories[-1], starts[-1]


def _composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    eps: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        q, v, log_f = q * scale, F.pad(v, (0, 1), value=1.0), F.logsigmoid(f)
        lengths = None
        if cu_seqlens is not None:
            lengths, (q, k, v, i, log_f) = cast("tuple[list[int], list[Tensor]]", sequences.padded(cu_seqlens, q, k, v, i, log_f))
            after = torch.arange(q.shape[1], device=q.device) >= cu_seqlens.diff().unsqueeze(-1)
            i = i.masked_fill(after.unsqueeze(-1), -torch.inf)
        memory = torch.cat([c, n.unsqueeze(-1)], -1)
        if chunk_size == 0 or q.shape[1] == 1:
            out, memory, m = _recurrence(q, k, v, i, log_f, memory, m, eps)
        else:
            out, memory, m = _chunked(q, k, v, i, log_f, memory, m, eps, chunk_size)
        if lengths is not None:
            out = torch.cat([o[:length] for o, length in zip(out.unbind(), lengths, strict=True)]).unsqueeze(0)
        return out.contiguous(), memory[..., :-1].contiguous(), memory[..., -1].contiguous(), m


def _fake(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c: Tensor, n: Tensor, m: Tensor, *options: object) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (v, c, n, m))


_mlstm = Kernel(
    "phyla_linear_rnn::mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor c, Tensor n, Tensor m, Tensor? cu_seqlens, "
    "float scale, float eps, int chunk_size) -> (Tensor, Tensor, Tensor, Tensor)",
    _composite,
    differentiable=("q", "k", "v", "i", "f", "c", "n", "m"),
    fake=_fake,
)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    initial_state: MLSTMState | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    mode: Mode = "auto",
) -> tuple[Tensor, MLSTMState]:
    r"""Matrix LSTM: an exponentially gated matrix memory, read through a normaliser.

    With ``l = logsigmoid(f)``: ``m' = max(l + m, i)``, ``c' = e^{l+m-m'} c + e^{i-m'} k v^T``, ``n' = e^{l+m-m'} n + e^{i-m'} k``, then
    ``o = scale c'^T q / (max(|scale n'^T q|, e^-m') + eps)``. ``m`` keeps numbers in range; without ``eps`` outputs do not depend on it.

    Args:
        q: Queries (B, T, H, K).
        k: Keys (B, T, H, K).
        v: Values (B, T, H, V).
        i: Pre-activations of the input gate ``e^i``, (B, T, H).
        f: Pre-activations of the forget gate ``sigmoid(f)``, (B, T, H).
        scale: Factor of the queries at read-out; K^-1/2 where None. The states are unscaled.
        initial_state: The state before the first token, of shapes (N, H, K, V), (N, H, K), (N, H); zeros where None.
        cu_seqlens: (N + 1,) offsets in tokens of N sequences packed in a batch of 1; N = B without it.
        eps: Added to the normaliser.
        chunk_size: Tokens of a chunk of the torch path.
        mode: "auto" is the fastest path; "recurrent" and "chunk" are the torch paths, token by token and chunk by chunk. They agree to
            rounding.

    Returns:
        Outputs (B, T, H, V) in the dtype of ``v``, and the final state, in float64 if an argument is, else in float32.

    Raises:
        TypeError: If an argument is no tensor of the right kind.
        ValueError: If shapes or devices disagree, T is 0, or an option is out of its range.

    Source: "xLSTM: Extended Long Short-Term Memory", equations 19 to 27.
    """
    batch, tokens, heads, width = sequences.expect_queries(q).shape
    sequences.expect("k", k, (batch, tokens, heads, width), "q", q.device)
    sequences.expect("v", v, (batch, tokens, heads, "V"), "q", q.device)
    sequences.expect("i", i, (batch, tokens, heads), "q", q.device)
    sequences.expect("f", f, (batch, tokens, heads), "q", q.device)
    cu_seqlens = sequences.expect_packing(cu_seqlens, q)
    shapes = {"c": (heads, width, v.shape[3]), "n": (heads, width), "m": (heads,)}
    if initial_state is None:
        dtype, count = sequences.accumulation_dtype(q, k, v, i, f), sequences.sequences_of(q, cu_seqlens)
        state = MLSTMState(*(torch.zeros(count, *sizes, dtype=dtype, device=q.device) for sizes in shapes.values()))
    else:
        if not isinstance(initial_state, tuple) or len(initial_state) != 3:
            raise TypeError(f"initial_state: expected an MLSTMState or None, got {type(initial_state).__name__}")
        state = MLSTMState(*initial_state)
        for (name, sizes), tensor in zip(shapes.items(), state, strict=True):
            sequences.expect_state(f"initial_state.{name}", checks.floating(f"initial_state.{name}", tensor), q, cu_seqlens, sizes)
        dtype = sequences.accumulation_dtype(q, k, v, i, f, *state)
    eps = checks.in_range("eps", eps, 0.0)
    options = (cu_seqlens, sequences.expect_scale(scale, width), eps, sequences.expect_mode(mode, chunk_size, 64))
    run = _mlstm if mode == "auto" else _mlstm.plain
    out, *final = run(*(x.to(dtype) for x in (q, k, v, i, f, *state)), *options)
    return out.to(v.dtype), MLSTMState(*final)
