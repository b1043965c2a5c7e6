"""The empirical Fisher matrix F = damping I + GᵀG/m of m gradients: its inverse without a d x d matrix, and pruning with it.

Legend: G (m, d) gradients as rows, S = m damping I + G Gᵀ = L Lᵀ, W = damping^(-1/2) L⁻¹ G, so that F⁻¹ = I/damping - WᵀW.
Source: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", 2021. The paper's sequential
recursion v_i = g_i/damping - Σ_k v_k (v_k·g_i)/(m + g_k·v_k) is this Cholesky factorisation: its v_i/sqrt(m + g_i·v_i) are the rows of W.
"""

from typing import Literal

import torch
from torch import Tensor

from phyla.second_order.gram import cholesky, expand, factor_panels, gram, project
from phyla.second_order.inverse_fisher import InverseFisher, block_parts, check_damping
from phyla.shared import checks

__all__ = ["fisher_quadratic", "mfac_factor", "mfac_ihvp", "obs_prune"]


def mfac_factor(grads: Tensor, damping: float) -> Tensor:
    """The factor W of the inverse Fisher matrix I/damping - WᵀW.

    Args:
        grads: gradients as rows, (..., m, d).
        damping: the multiple of the identity in F.

    Returns: (..., m, d) in the dtype of `grads`; differentiable. The factorisation runs in float64.
    Raises: TypeError, ValueError: grads no floating (..., m, d) tensor or empty, damping not positive.
    Source: M-FAC, section 3.1, as a Cholesky factorisation.
    """
    damping = check_damping(damping)
    _check_batch(grads)
    lower = cholesky(_damped(gram(grads), grads.shape[-2] * damping))
    return torch.cat([panel.to(grads.dtype) for _, panel in factor_panels(grads, damping, lower)], -1)


def mfac_ihvp(grads: Tensor, damping: float, x: Tensor) -> Tensor:
    """F⁻¹ x = (x - Gᵀ S⁻¹ G x) / damping.

    Args:
        grads: gradients as rows, (..., m, d).
        damping: the multiple of the identity in F.
        x: a vector for each stack of gradients, (..., d); leading dimensions broadcast.

    Returns: the shape of `x` broadcast with the leading dimensions of `grads`, in the dtype of `x`; differentiable in both.
    Raises: TypeError, ValueError: grads no floating (..., m, d) tensor or empty, damping not positive, x of another last size.
    Source: Woodbury's identity; M-FAC, section 3.
    """
    damping = check_damping(damping)
    _check_batch(grads)
    checks.last_dim("x", checks.floating("x", x), grads.shape[-1])
    lower = cholesky(_damped(gram(grads), grads.shape[-2] * damping))
    # The vectors that share one factorisation become the columns of one product.
    columns = x.reshape(-1, x.shape[-1]).mT if grads.dim() == 2 else x.unsqueeze(-1)
    solved = (columns - expand(grads, torch.cholesky_solve(project(grads, columns), lower))) / damping
    return (solved.mT.reshape(x.shape) if grads.dim() == 2 else solved.squeeze(-1)).to(x.dtype)


@torch.no_grad()
def obs_prune(
    weights: Tensor,
    grads: Tensor,
    *,
    num_prune: int,
    damping: float = 1e-5,
    block_size: int | None = None,
    compensation: Literal["joint", "independent"] = "joint",
) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon: remove the weights whose loss hurts least, and move the others to make up for it.

    The saliency of weight j is w_j² / (2 [F⁻¹]_jj); the `num_prune` smallest go (the set Q), with ties in order of position.
    `"independent"` compensates for each as if it went alone (the paper's rule), `"joint"` minimises ½ δᵀFδ subject to δ_Q = -w_Q.

    Args:
        weights: (d,).
        grads: gradients at these weights as rows, (m, d).
        num_prune: how many weights to remove, 0 to d.
        damping: the multiple of the identity in F.
        block_size: F is block-diagonal over ranges of so many weights; None for one block.
        compensation: how the kept weights move.

    Returns: the keep mask, bool (d,), and the new weights, (d,), zero where removed.
    Raises: TypeError, ValueError: naming the argument.
    Source: M-FAC, section 3.2 and appendix; the joint form is the block elimination of the constrained quadratic.
    """
    checks.choice("compensation", compensation, ("joint", "independent"))
    inverse = InverseFisher(grads, damping=damping, block_size=block_size)
    checks.finite("weights", checks.shape("weights", checks.floating("weights", weights), (inverse.dim,)))
    if isinstance(num_prune, bool) or not isinstance(num_prune, int):
        raise TypeError(f"num_prune: expected an int, got {type(num_prune).__name__} {num_prune!r}")
    checks.in_range("num_prune", num_prune, 0, inverse.dim)
    w, diagonal = weights.double(), inverse.diagonal().double()
    gone = torch.argsort(w.square() / (2 * diagonal), stable=True)[:num_prune]
    keep = torch.ones_like(w, dtype=torch.bool)
    keep[gone] = False
    if compensation == "joint":
        moved = w + _joint(w, grads, keep, damping, block_size)
    else:
        moved = w + inverse.ihvp(torch.where(keep, 0, -w / diagonal))
    return keep, torch.where(keep, moved, 0).to(weights.dtype)


def _joint(w: Tensor, grads: Tensor, keep: Tensor, damping: float, block_size: int | None) -> Tensor:
    """The minimiser δ of ½ δᵀFδ with δ_Q = -w_Q, on the kept entries (0 on Q): G_Kᵀ (m damping I + G_K G_Kᵀ)⁻¹ G_Q w_Q, block by block."""
    shift = grads.shape[0] * damping
    moves = []
    for part in block_parts(grads, block_size):
        kept = part.columns(grads) * part.columns(keep[None]).to(grads.dtype)
        lost = project(part.columns(grads), part.columns(torch.where(keep, 0, w)[None]).mT)
        if part.width < grads.shape[0]:
            small = kept.double()
            move = torch.cholesky_solve(small.mT @ lost, cholesky(_damped(small.mT @ small, shift)))
        else:
            move = expand(kept, torch.cholesky_solve(lost, cholesky(_damped(gram(kept), shift))))
        moves.append(move.flatten())
    return torch.cat(moves)


def fisher_quadratic(grads: Tensor, vector: Tensor, *, damping: float, block_size: int | None = None) -> Tensor:
    """½ vᵀFv of v (d,), a float64 scalar; F of the gradients (m, d) with blocks of `block_size`."""
    energy = damping * vector.double().square().sum()
    for part in block_parts(grads, block_size):
        energy = energy + project(part.columns(grads), part.columns(vector[None]).mT).square().sum() / grads.shape[0]
    return energy / 2


def _check_batch(grads: Tensor) -> None:
    checks.floating("grads", grads)
    if grads.dim() < 2 or grads.numel() == 0:
        raise ValueError(f"grads: expected a non-empty tensor of shape (..., m, d), got shape {tuple(grads.shape)}")


def _damped(matrix: Tensor, shift: float) -> Tensor:
    return matrix + shift * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
