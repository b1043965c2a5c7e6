"""Conjugate gradients for (A + damping I) x = b."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phyla.second_order.operator import CurvatureOperator
from phyla.shared import checks

__all__ = ["CGResult", "conjugate_gradient"]


@dataclass(frozen=True)
class CGResult:
    """The solution and how it was reached.

    Attributes:
        x: (P,).
        residual_norms: (iterations + 1,), the norm of `b - (A + damping I) x`, from the start on, float64.
        iterations: products with A, without that of `x0`.
        converged: whether the last residual is at most `rtol ‖b‖`.
    """

    x: Tensor
    residual_norms: Tensor
    iterations: int
    converged: bool


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


def conjugate_gradient(
    operator: CurvatureOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    x0: Tensor | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    rtol: float = 1e-6,
    max_iter: int | None = None,
) -> CGResult:
    """Solve a symmetric positive definite system. Equivalent to `scipy.sparse.linalg.cg`.

    Stops, unconverged, at a direction of curvature that is not positive: the operator is then not positive definite.

    Args:
        operator: A, (P, P).
        rhs: b, (P,).
        damping: added to the diagonal of A, at least 0.
        x0: start, (P,); default zero.
        preconditioner: an approximate inverse, (P,) -> (P,), symmetric positive definite; for one `InverseFisher.ihvp`.
        rtol: wanted `‖residual‖ / ‖b‖`.
        max_iter: most iterations; default 10 P.

    Raises: TypeError, ValueError for wrong sizes and ranges.
    Source: Hestenes and Stiefel 1952, "Methods of Conjugate Gradients for Solving Linear Systems".
    """
    size = operator.shape[0]
    b = checks.finite("rhs", checks.shape("rhs", checks.floating("rhs", rhs), (size,))).to(operator.device, operator.dtype)
    checks.in_range("damping", damping, 0.0)
    checks.in_range("rtol", rtol, 0.0)
    limit = 10 * size if max_iter is None else checks.positive_int("max_iter", max_iter)
    if x0 is not None:
        checks.shape("x0", checks.floating("x0", x0), (size,))
    apply = preconditioner or (lambda v: v)
    with torch.no_grad():
        x = torch.zeros_like(b) if x0 is None else x0.to(operator.device, operator.dtype).clone()
        residual = b.clone() if x0 is None else b - operator.matvec(x) - damping * x
        target = rtol * float(torch.linalg.vector_norm(b))
        norms = [float(torch.linalg.vector_norm(residual))]
        z = apply(residual)
        direction, rho = z.clone(), _dot(residual, z)
        while norms[-1] > target and len(norms) <= limit:
            product = operator.matvec(direction).add(direction, alpha=damping)
            curvature = _dot(direction, product)
            if not curvature > 0:
                break
            step = rho / curvature
            x.add_(direction, alpha=step)
            residual.sub_(product, alpha=step)
            norms.append(float(torch.linalg.vector_norm(residual)))
            z = apply(residual)
            rho, previous = _dot(residual, z), rho
            direction.mul_(rho / previous).add_(z)
    return CGResult(x, torch.tensor(norms, dtype=torch.float64), len(norms) - 1, norms[-1] <= target)
