"""What all recurrences over sequences share: argument checks, the compute dtype, packed sequences."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.shared import checks

Mode = Literal["auto", "recurrent", "chunk"]
_MODES: tuple[str, ...] = get_args(Mode)


def _sizes(sizes: Sequence[int | str]) -> str:
    return "(" + ", ".join(map(str, sizes)) + ("," if len(sizes) == 1 else "") + ")"


def expect(name: str, tensor: object, sizes: Sequence[int | str], match: str = "", device: torch.device | None = None) -> Tensor:
    """A floating tensor of the given sizes, where a str stands for any size of at least 1, on ``device``.

    Raises: TypeError, ValueError, as ``k: expected shape (2, 128, n, 4, 64) to match q, got (2, 127, 2, 4, 64)``.
    """
    checked = checks.floating(name, tensor)
    got = checked.shape
    # One comparison where it can be: checks are much of the time of decoding one token.
    if got != sizes and (
        len(got) != len(sizes) or any(s < 1 if isinstance(want, str) else s != want for s, want in zip(got, sizes, strict=True))
    ):
        at_least = ", every size at least 1" if len(got) == len(sizes) and 0 in got else ""
        raise ValueError(f"{name}: expected shape {_sizes(sizes)}{f' to match {match}' if match else ''}{at_least}, got {tuple(got)}")
    if device is not None and checked.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}{f' like {match}' if match else ''}, got one on {checked.device}")
    return checked


def expect_queries(q: object) -> Tensor:
    """Queries of shape (B, T, H, K), where only the batch may be empty."""
    checked = checks.floating("q", q)
    if checked.dim() != 4 or min(checked.shape[1:]) < 1:
        raise ValueError(f"q: expected shape (B, T, H, K) with T, H and K at least 1, got {tuple(checked.shape)}")
    return checked


def expect_heads(name: str, heads: int, query_heads: int) -> None:
    """The number of value heads is a multiple of that of the query heads."""
    if heads < 1 or heads % query_heads:
        raise ValueError(f"{name}: expected a number of heads that is a multiple of the {query_heads} of q, got {heads}")


def expect_gate(g: object, q: Tensor, heads: int, *, scalar: bool = True) -> Tensor:
    """Log decays of shape (B, T, HV), unless ``scalar`` is False, or (B, T, HV, K)."""
    checked = checks.floating("g", g)
    batch, tokens, _, width = q.shape
    wanted = [(batch, tokens, heads)] * scalar + [(batch, tokens, heads, width)]
    got = tuple(checked.shape)
    if got not in wanted:
        raise ValueError(f"g: expected shape {' or '.join(map(_sizes, wanted))} to match q, got {got}")
    return expect("g", checked, got, "q", q.device)


def expect_packing(cu_seqlens: object, q: Tensor) -> Tensor | None:
    """Offsets of packed sequences in tokens, as int64: they start at 0, never decrease and end at T; the batch is 1."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = str(cu_seqlens.dtype) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected an int32 or int64 Tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape (N + 1,) with N at least 1, got {tuple(cu_seqlens.shape)}")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected a batch of 1 that holds the packed sequences, got B={q.shape[0]}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: expected a tensor on {q.device} like q, got one on {cu_seqlens.device}")
    if not torch.compiler.is_compiling() and not cu_seqlens.is_meta:  # a traced graph has no values; the native kernel looks again
        offsets, tokens = cu_seqlens.tolist(), q.shape[1]
        if offsets[0] != 0 or offsets[-1] != tokens or any(a > b for a, b in itertools.pairwise(offsets)):
            raise ValueError(f"cu_seqlens: expected offsets that start at 0, never decrease and end at {tokens}, got {offsets}")
    return cu_seqlens.long()


def expect_state(name: str, state: object, q: Tensor, cu_seqlens: Tensor | None, sizes: Sequence[int]) -> Tensor | None:
    """One initial state of the given sizes a sequence, or None."""
    if state is None:
        return None
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return expect(name, state, (sequences, *sizes), "q and v" if cu_seqlens is None else "q, v and cu_seqlens", q.device)


def expect_mode(mode: object, chunk_size: object, default: int) -> int:
    """Tokens of a chunk of the torch path; 0 for the token-by-token recurrence."""
    chosen = checks.choice("mode", mode, _MODES)
    size = default if chunk_size is None else checks.positive_int("chunk_size", chunk_size)
    return 0 if chosen == "recurrent" else size


def expect_scale(scale: float | None, width: int) -> float:
    """The factor of the read-out."""
    return float(width**-0.5) if scale is None else checks.in_range("scale", scale)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if a tensor is, else float32: the dtype of all sums and states."""
    return torch.float64 if torch.float64 in [None if t is None else t.dtype for t in tensors] else torch.float32


def promoted(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in their common accumulation dtype."""
    dtype = accumulation_dtype(*tensors)
    return tuple([None if t is None else as_dtype(t, dtype) for t in tensors])


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``; where nothing is to do the comparison alone is a microsecond faster, and decoding counts them."""
    return x if x.dtype == dtype else x.to(dtype)


def sequences_of(batch: Tensor, cu_seqlens: Tensor | None) -> int:
    """N: how many sequences, hence states, there are."""
    return batch.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def padded(cu_seqlens: Tensor, *packed: Tensor | None) -> tuple[list[int], tuple[Tensor | None, ...]]:
    """Packed tensors (1, T, ...) as (N, longest, ...) with zeros after each sequence, and the lengths."""
    lengths: list[int] = cu_seqlens.diff().tolist()
    longest = max(lengths)

    def unpack(x: Tensor) -> Tensor:
        pieces = torch.split(x.squeeze(0), lengths)
        return torch.stack([F.pad(p, (0, 0) * (p.dim() - 1) + (0, longest - n)) for p, n in zip(pieces, lengths, strict=True)])

    return lengths, tuple(None if x is None else unpack(x) for x in packed)


def over_sequences(
    function: Callable[..., tuple[Tensor, Tensor]], cu_seqlens: Tensor | None, inputs: Sequence[Tensor | None], *rest: object
) -> tuple[Tensor, Tensor]:
    """``function(*inputs, *rest)`` of batched sequences (B, T, ...); packed ones are padded for it, with zeros that leave states alone."""
    with torch.autocast(next(x.device.type for x in inputs if x is not None), enabled=False):
        if cu_seqlens is None:
            return function(*inputs, *rest)
        lengths, batched = padded(cu_seqlens, *inputs)
        out, state = function(*batched, *rest)
        return torch.cat([o[:n] for o, n in zip(out.unbind(), lengths, strict=True)]).unsqueeze(0), state


def value_heads(x: Tensor, heads: int, dim: int = -2) -> Tensor:
    """Key heads repeated for the value heads that read them."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)
