"""What a recurrence does to its state: eigenvalues of its transitions, decay, rank, and the reflections that compose a rotation."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phyla.linear_rnn.functional import transition_matrices
from phyla.shared import checks

__all__ = ["effective_rank", "householder_factors", "receptive_decay", "transition_eigenvalues"]

Arguments = dict[str, Any]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the arguments of every recurrence that runs under it, as float64 or None, by their names in the op's schema."""

    names = ("delta_product", "dplr", "linear_attention", "mlstm")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, Arguments]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "phyla_linear_rnn" and name in self.names:
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            self.calls.append((name, {key: value.double() if isinstance(value, Tensor) else value for key, value in given.items()}))
        return func(*args, **(kwargs or {}))


def _recurrence(layer: Callable[[Tensor], Any], x: Tensor) -> tuple[str, Arguments]:
    """The name and the arguments of the recurrence that the layer runs on x."""
    watch = _Watch()
    with torch.no_grad(), watch:
        layer(x)
    if len(watch.calls) != 1:
        raise ValueError(f"layer: expected one that runs one recurrence of phyla.linear_rnn.functional, got {len(watch.calls)}")
    return watch.calls[0]


def transition_eigenvalues(layer: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """Eigenvalues of the matrix by which a layer multiplies its state, at every token and in every head.

    Their signs and angles tell what the layer can track: with eigenvalues in [0, 1] no parity, with real ones in [-1, 1] no counting
    modulo 3, with pairs on the unit circle rotations. For mLSTM they are those of the state without its stabiliser: the forget gate.

    Args:
        layer: any layer of this package, or a callable that runs one of its recurrences, such as `partial(rwkv, v_first=v)`.
        x: what the layer reads, `(B, T, hidden_size)`.

    Returns:
        Complex128, `(B, T, heads, K)`; the order within a matrix has no meaning.

    Raises:
        ValueError: if the layer runs no recurrence, or several.

    Source:
        *Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues*, theorems 1 and 2; *DeltaProduct*, section 3.
    """
    name, given = _recurrence(layer, x)
    g = _log_decay(name, given)
    if name == "delta_product":
        keys = given["k"].repeat_interleave(g.shape[2] // given["k"].shape[3], 3)
        keys = keys * torch.rsqrt(keys.square().sum(-1, keepdim=True) + 1e-6) if given["qk_l2norm"] else keys
        matrices = transition_matrices(keys, given["beta"], g)
    elif name == "dplr":
        matrices = torch.diag_embed(g.exp()) + given["b"].unsqueeze(-1) * given["a"].unsqueeze(-2)
    else:
        return g.exp().to(torch.complex128)
    eigenvalues: Tensor = torch.linalg.eigvals(matrices)
    return eigenvalues


def receptive_decay(layer: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """How much of its state each head keeps from one token to the next: the decay e^g, averaged over sequences, tokens and channels.

    A head of decay d looks back about 1 / (1 - d) tokens. Reflections, which move the state without shortening it, do not count.

    Args:
        layer: as in `transition_eigenvalues`.
        x: what the layer reads, `(B, T, hidden_size)`.

    Returns:
        Float64 `(heads,)` in [0, 1]; ones for a layer without gate.

    Raises:
        ValueError: if the layer runs no recurrence, or several.
    """
    return _log_decay(*_recurrence(layer, x)).exp().mean((0, 1, 3))


def _log_decay(name: str, given: Arguments) -> Tensor:
    """Logarithms of the decays, (B, T, heads, K)."""
    (batch, tokens, _, width), heads = given["q"].shape, given["v"].shape[-2]
    gate: Tensor | None = F.logsigmoid(given["f"]) if name == "mlstm" else given["g"]
    if gate is None:
        gate = torch.zeros(batch, tokens, heads, dtype=torch.float64, device=given["q"].device)
    return (gate if gate.dim() == 4 else gate.unsqueeze(-1)).expand(batch, tokens, heads, width)


@torch.no_grad()
def householder_factors(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Write orthogonal matrices as products of as few reflections as there are.

    `delta_product` with these keys, these rates and v = 0 maps its state S to Q S, since Q = H_m .. H_2 H_1 with
    H_j = I - beta_j k_j k_j^T, and beta_j = 2 for a reflection. The number of reflections is the rank of Q - I.

    Args:
        Q: orthogonal, `(..., m, m)`.

    Returns:
        Unit keys `(..., m, m)`, row j the key of step j, and rates `(..., m)`; steps that are not needed come last and are zero in both.

    Raises:
        TypeError: if Q is no floating tensor.
        ValueError: if it is not square or not orthogonal to about half the digits of its dtype.

    Source:
        The theorem of Cartan and Dieudonne, used in *DeltaProduct* for what n reflections can express.
    """
    checks.shape("Q", Q, (*[None] * (Q.dim() - 2), "m", "m") if isinstance(Q, Tensor) and Q.dim() > 1 else ("m", "m"))
    checks.finite("Q", checks.floating("Q", Q))
    m, exact = Q.shape[-1], Q.double()
    identity = torch.eye(m, dtype=torch.float64, device=Q.device)
    off = (exact.mT @ exact - identity).abs().amax().item() if Q.numel() else 0.0
    if off > torch.finfo(Q.dtype).eps ** 0.5:
        raise ValueError(f"Q: expected an orthogonal matrix, got one whose Q^T Q differs from the identity by {off:.2g}")
    left, _, right = torch.linalg.svd(exact)
    rest = right.mT @ left.mT  # the transpose of the nearest orthogonal matrix: reflections applied to it one by one make it the identity
    keys, rates = torch.zeros_like(exact), torch.zeros_like(exact[..., 0])
    for step in range(m):
        # A reflection that carries the image of an axis back to the axis leaves all vectors alone that are at rest already.
        moved = rest - identity
        length, axis = torch.linalg.vector_norm(moved, dim=-2).max(-1)
        needed = length > 32 * m * torch.finfo(torch.float64).eps
        key = moved.take_along_dim(axis[..., None, None], -1).squeeze(-1) / length.where(needed, 1.0)[..., None]
        keys[..., step, :], rates[..., step] = key.where(needed[..., None], 0.0), 2.0 * needed
        rest = rest - rates[..., step, None, None] * key[..., :, None] * (key[..., None, :] @ rest)
    return keys.to(Q.dtype), rates.to(Q.dtype)


def effective_rank(state: Tensor) -> Tensor:
    """How many directions a state holds: the exponential of the entropy of its singular values, taken as shares of their sum.

    Args:
        state: recurrent states `(..., K, V)`.

    Returns:
        Between 1 and min(K, V), or 0 for a state of zeros; `(...)`.

    Raises:
        TypeError, ValueError: if `state` is no floating tensor of finite values with two dimensions or more.

    Source:
        Roy and Vetterli, *The Effective Rank*.
    """
    checks.finite("state", checks.floating("state", state))
    if state.dim() < 2:
        raise ValueError(f"state: expected shape (..., K, V), got shape {tuple(state.shape)}")
    values = torch.linalg.svdvals(state if state.dtype == torch.float64 else state.float())
    total = values.sum(-1, keepdim=True)
    shares = values / total.where(total > 0, 1.0)
    rank: Tensor = torch.special.entr(shares).sum(-1).exp() * (total > 0).squeeze(-1)
    return rank
