"""What a recurrence does to its state: eigenvalues of its transitions, decay, rank, and the reflections that compose a rotation."""

import torch
from torch import Tensor

from phyla.shared import checks

__all__ = ["effective_rank", "householder_factors"]


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
