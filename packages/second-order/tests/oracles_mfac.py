"""The equations of M-FAC and of Optimal Brain Surgeon, dense and in float64."""

import torch
from torch import Tensor


def fisher(grads: Tensor, damping: float, block_size: int | None = None, count: int | None = None) -> Tensor:
    """damping I + GᵀG / count, zero across blocks."""
    g = grads.double()
    d = g.shape[1]
    block = torch.arange(d) // (block_size or d)
    return damping * torch.eye(d, dtype=torch.float64) + (block[:, None] == block) * (g.T @ g) / (count or len(g))


def recursion(grads: Tensor, damping: float) -> Tensor:
    """Rows v_i / sqrt(m + g_i·v_i), v_i = g_i/damping - Σ_k v_k (v_k·g_i)/(m + g_k·v_k)."""
    m = len(grads)
    vectors: list[Tensor] = []
    for i in range(m):
        v = grads[i] / damping
        for g, u in zip(grads[:i], vectors, strict=True):
            v = v - u * (u @ grads[i]) / (m + g @ u)
        vectors.append(v)
    return torch.stack([v / (m + g @ v).sqrt() for g, v in zip(grads, vectors, strict=True)])


def joint_compensation(weights: Tensor, matrix: Tensor, keep: Tensor) -> Tensor:
    """The minimiser of δᵀFδ with the removed weights at zero: F_KK δ_K = F_KQ w_Q."""
    new = torch.zeros_like(weights)
    move = torch.linalg.solve(matrix[keep][:, keep], matrix[keep][:, ~keep] @ weights[~keep])
    new[keep] = weights[keep] + move
    return new


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
