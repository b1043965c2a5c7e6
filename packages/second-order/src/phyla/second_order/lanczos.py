"""The Lanczos process with full reorthogonalisation, for one start vector or a block of independent ones.

The basis is one buffer whose rows are the Lanczos vectors, so that the classical Gram-Schmidt passes (two: "twice is enough") are four
GEMVs over contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phyla.second_order.operator import CurvatureOperator
from phyla.second_order.probes import normal
from phyla.shared import checks

__all__ = ["LanczosResult", "lanczos"]


@dataclass(frozen=True)
class LanczosResult:
    """`A basis = basis T + rest`, T tridiagonal.

    Attributes:
        alphas: (m,), the diagonal of T, float64.
        betas: (m - 1,), its off-diagonal, float64.
        basis: (P, m), orthonormal columns.
    """

    alphas: Tensor
    betas: Tensor
    basis: Tensor


def breakdown(dtype: torch.dtype) -> float:
    """A Lanczos vector shorter than this times the matrix's scale is noise."""
    return 1e-12 if dtype == torch.float64 else 1e-6


def orthogonalise(basis_RMP: Tensor, vectors_RP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take the parts along the basis out of the vectors, twice.

    Returns: coefficients (R, M) in float64, the rest (R, P), its norms (R,) in float64.
    """
    total = torch.zeros(basis_RMP.shape[:2], dtype=torch.float64, device=vectors_RP.device)
    rest = vectors_RP
    for _ in range(2):
        part = torch.bmm(basis_RMP, rest.unsqueeze(-1)).squeeze(-1)
        rest = torch.baddbmm(rest.unsqueeze(1), part.unsqueeze(1), basis_RMP, alpha=-1).squeeze(1)
        total += part
    return total, rest, torch.linalg.vector_norm(rest, dim=1).double()


def block_lanczos(operator: CurvatureOperator, starts_RP: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Run R independent processes in step, one `matmat` a step.

    Returns: alphas (R, m), betas (R, m), basis (R, m, P), and the steps that each process made before its space was exhausted.
    """
    runs, size = starts_RP.shape
    alphas, betas = (torch.zeros(runs, num_steps, dtype=torch.float64, device=operator.device) for _ in range(2))
    basis = torch.zeros(runs, num_steps, size, dtype=operator.dtype, device=operator.device)
    lengths = [num_steps] * runs
    basis[:, 0] = starts_RP / torch.linalg.vector_norm(starts_RP, dim=1, keepdim=True)
    for j in range(num_steps):
        products = operator.matmat(basis[:, j].T).T
        coefficients, rest, norms = orthogonalise(basis[:, : j + 1], products)
        alphas[:, j] = coefficients[:, j]
        scale = torch.maximum(alphas.abs().amax(1), betas.amax(1))
        ended = norms <= breakdown(operator.dtype) * scale
        lengths = [min(length, j + 1) if end else length for length, end in zip(lengths, ended.tolist(), strict=True)]
        if j + 1 == num_steps or max(lengths) <= j + 1:
            break
        alive = torch.tensor([length > j + 1 for length in lengths], device=operator.device)
        betas[:, j] = torch.where(alive, norms, 0.0)
        # An ended process goes on with the zero vector, which costs nothing but its place in the block.
        basis[:, j + 1] = rest * torch.where(alive, 1 / norms.clamp(min=torch.finfo(torch.float32).tiny), 0.0).to(operator.dtype)[:, None]
    return alphas, betas, basis, lengths


def checked_steps(num_steps: int, operator: CurvatureOperator) -> int:
    """A number of Lanczos steps in [1, P]."""
    steps = checks.positive_int("num_steps", num_steps)
    if steps > operator.shape[0]:
        raise ValueError(f"num_steps: expected at most {operator.shape[0]}, the size of the operator, got {num_steps}")
    return steps


def lanczos(
    operator: CurvatureOperator, num_steps: int, *, start: Tensor | None = None, generator: torch.Generator | None = None
) -> LanczosResult:
    """Tridiagonalise a symmetric operator on the Krylov space of a vector.

    Stops early when the space is invariant: the next vector is shorter than 1e-12 (float64; else 1e-6) of T's largest entry.

    Args:
        operator: symmetric, (P, P).
        num_steps: products, at most P.
        start: (P,), not zero; default a standard normal vector.
        generator: of the default start.

    Raises: TypeError, ValueError for wrong sizes, `num_steps` outside [1, P], or a start of zero length.
    Source: Golub and Van Loan, "Matrix Computations", 10.1; two Gram-Schmidt passes after Giraud, Langou, Rozložník 2005.
    """
    steps = checked_steps(num_steps, operator)
    if start is None:
        start = normal(operator, generator)
    checks.finite("start", checks.shape("start", checks.floating("start", start), (operator.shape[0],)))
    if not bool(start.any()):
        raise ValueError("start: expected a vector that is not zero, got zeros")
    with torch.no_grad():
        alphas, betas, basis, (length,) = block_lanczos(operator, start.to(operator.device, operator.dtype)[None], steps)
    return LanczosResult(alphas[0, :length], betas[0, : length - 1], basis[0, :length].T)
