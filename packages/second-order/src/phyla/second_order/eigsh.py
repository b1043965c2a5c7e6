"""Extreme eigenpairs by Lanczos with thick restart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from phyla.second_order.lanczos import breakdown, orthogonalise
from phyla.second_order.operator import CurvatureOperator
from phyla.second_order.probes import normal
from phyla.shared import checks

__all__ = ["EigenResult", "eigsh"]


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs, the wanted end first.

    Attributes:
        eigenvalues: (k,), float64; descending for "LA", ascending for "SA", descending in size for "LM".
        eigenvectors: (P, k), orthonormal columns.
        residuals: (k,), `‖A v - θ v‖` as Lanczos knows it, float64.
        converged: (k,), whether the residual is at most `tol` times the eigenvalue.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    converged: Tensor


def eigsh(
    operator: CurvatureOperator,
    k: int = 1,
    *,
    which: Literal["LA", "SA", "LM"] = "LA",
    max_steps: int | None = None,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
) -> EigenResult:
    """A few extreme eigenpairs of a symmetric operator. Equivalent to `scipy.sparse.linalg.eigsh`.

    Lanczos in a basis of `max(2k + 10, 24)` vectors; when it is full, the best Ritz vectors are kept and the process goes on from them.

    Args:
        operator: symmetric, (P, P).
        k: number of pairs, at most P.
        which: "LA" algebraically largest, "SA" smallest, "LM" largest in absolute value.
        max_steps: largest number of products; default `max(10 P, 200)` at most 3000.
        tol: residual relative to the eigenvalue (and to the machine's precision of the largest) at which a pair has converged.
        generator: of the start vector.

    Raises: TypeError, ValueError for arguments outside their ranges.
    Source: Wu and Simon 2000, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems".
    """
    size = operator.shape[0]
    checks.choice("which", which, ("LA", "SA", "LM"))
    checks.in_range("tol", tol, 0.0)
    if checks.positive_int("k", k) > size:
        raise ValueError(f"k: expected at most {size}, the size of the operator, got {k}")
    limit = min(max(10 * size, 200), 3000) if max_steps is None else max(checks.positive_int("max_steps", max_steps), k)
    capacity = min(size, max(2 * k + 10, 24), limit)
    with torch.no_grad():
        return _thick_restart(operator, k, which, limit, capacity, tol, generator)


def _order(values: Tensor, which: str) -> Tensor:
    return torch.argsort({"LA": -values, "SA": values, "LM": -values.abs()}[which])


def _thick_restart(
    operator: CurvatureOperator, k: int, which: str, limit: int, capacity: int, tol: float, generator: torch.Generator | None
) -> EigenResult:
    basis = torch.zeros(
        capacity + 1, operator.shape[0], dtype=operator.dtype, device=operator.device
    )  # rows; the last one is the next vector
    small = torch.zeros(capacity, capacity, dtype=torch.float64, device=operator.device)  # the projection of the operator on the basis
    basis[0] = torch.nn.functional.normalize(normal(operator, generator), dim=0)
    kept, steps, epsilon = 0, 0, torch.finfo(operator.dtype).eps
    while True:
        stop = min(capacity, kept + limit - steps)
        coupling = 0.0
        for j in range(kept, stop):
            column, rest, norm = orthogonalise(basis[None, : j + 1], operator.matvec(basis[j])[None])
            small[: j + 1, j] = small[j, : j + 1] = column[0]
            coupling = float(norm)
            if coupling <= breakdown(operator.dtype) * float(small.abs().max()):
                coupling = 0.0  # an invariant space: go on in its complement, uncoupled
                if j + 1 < operator.shape[0]:
                    rest = orthogonalise(basis[None, : j + 1], normal(operator, generator)[None])[1]
            basis[j + 1] = torch.nn.functional.normalize(rest[0], dim=0)
            steps += 1
            values, vectors = torch.linalg.eigh(small[: j + 1, : j + 1])
            order = _order(values, which)
            residuals = coupling * vectors[-1, order[:k]].abs()
            bound = max(tol, epsilon) * torch.clamp(values[order[:k]].abs(), min=epsilon * float(values.abs().max()))
            converged = residuals <= bound
            if coupling and j + 1 >= k and bool(converged.all()):
                stop = j + 1
                break
        done = bool(converged.all()) or steps >= limit
        keep = order[:k] if done else order[: min(max(2 * k, k + 5), stop - 1)]
        rotated = vectors[:, keep].T.to(operator.dtype) @ basis[:stop]
        if done:
            return EigenResult(values[keep], rotated.T, residuals, converged)
        kept = keep.shape[0]
        basis[:kept], basis[kept] = rotated, basis[stop].clone()
        small.zero_()
        small.diagonal()[:kept] = values[keep]
