"""Depthwise causal convolution over time, with a state for streaming and for packed sequences."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.linear_rnn.functional import _sequences as sequences
from phyla.shared import checks
from phyla.shared.kernels import Kernel


def _taps(extended: Tensor, weight: Tensor) -> Tensor:
    """Sums (B, T, D) over the windows of inputs (B, T + W - 1, D)."""
    width = weight.shape[1]
    tokens = extended.shape[1] - width + 1
    y = extended[:, :tokens] * weight[:, 0]
    for w in range(1, width):
        y = torch.addcmul(y, extended[:, w : w + tokens], weight[:, w])
    return y


def _composite(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    kept = weight.shape[1] - 1
    count = sequences.sequences_of(x, cu_seqlens)
    state = x.new_zeros(count, kept, x.shape[2]) if initial_state is None else initial_state
    if cu_seqlens is None:
        extended = torch.cat([state, x], 1)
        y, last = _taps(extended, weight), extended[:, extended.shape[1] - kept :].clone()
    else:
        # Every sequence behind its own state: sums that reach over a border are left out before anything is applied to them.
        lengths: list[int] = cu_seqlens.diff().tolist()
        pieces = [torch.cat([s, p]) for s, p in zip(state.unbind(), torch.split(x.squeeze(0), lengths), strict=True)]
        sequence = torch.repeat_interleave(torch.arange(count, device=x.device), cu_seqlens.diff(), output_size=x.shape[1])
        places = torch.arange(x.shape[1], device=x.device) + kept * sequence
        y = _taps(torch.cat(pieces).unsqueeze(0), weight)[:, places]
        last = torch.stack([p[len(p) - kept :] for p in pieces])
    if bias is not None:
        y = y + bias
    return F.silu(y) if silu else y, last


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    count = sequences.sequences_of(x, cu_seqlens)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(count, weight.shape[1] - 1, x.shape[2])


_causal_conv1d = Kernel(
    "phyla_linear_rnn::causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor, Tensor)",
    _composite,
    differentiable=("x", "weight", "bias", "initial_state"),
    fake=_fake,
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Depthwise causal convolution, ``y_t = sum_w weight[:, w] x_{t-W+1+w} + bias``, then SiLU if asked for.

    Args:
        x: Inputs (B, T, D).
        weight: Kernels (D, W); the last column belongs to the present token.
        bias: (D,), or None.
        activation: "silu" or None.
        initial_state: The W - 1 inputs before the first token, (N, W - 1, D), oldest first; zeros where None.
        cu_seqlens: (N + 1,) offsets in tokens of N sequences packed in a batch of 1; N = B without it.

    Returns:
        Outputs (B, T, D) in the dtype of ``x``, and the last W - 1 inputs (N, W - 1, D), in float64 if an argument is, else in float32.

    Raises:
        TypeError: If an argument is no tensor of the right kind.
        ValueError: If shapes or devices disagree, T is 0, or ``activation`` is unknown.

    Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3.4.
    """
    if checks.floating("x", x).dim() != 3 or min(x.shape[1:]) < 1:
        raise ValueError(f"x: expected shape (B, T, D) with T and D at least 1, got {tuple(x.shape)}")
    width = sequences.expect("weight", weight, (x.shape[2], "W"), "x", x.device).shape[1]
    if bias is not None:
        sequences.expect("bias", bias, (x.shape[2],), "x", x.device)
    if activation is not None:
        checks.choice("activation", activation, ("silu",))
    cu_seqlens = sequences.expect_packing(cu_seqlens, x)
    sequences.expect_state("initial_state", initial_state, x, cu_seqlens, (width - 1, x.shape[2]))
    inputs = sequences.promoted(x, weight, bias, initial_state)
    y, state = _causal_conv1d(*inputs, cu_seqlens, activation == "silu")
    return y.to(x.dtype), state
