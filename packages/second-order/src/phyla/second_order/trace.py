"""Stochastic estimates of the trace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from phyla.second_order.operator import CurvatureOperator
from phyla.second_order.probes import given, mean_and_error, rademacher
from phyla.shared import checks

__all__ = ["TraceEstimate", "trace"]


@dataclass(frozen=True)
class TraceEstimate:
    """A value, its standard error (infinite from one sample), and the products that it took."""

    value: float
    stderr: float
    num_matvecs: int


def leave_one_out(sketch_PM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q and R of the sketch, and the unit vectors S whose column i spans what Q loses when column i of the sketch is left out.

    The range without column i has the projector `Q (I - s_i s_iᵀ) Qᵀ`, `s_i` along column i of `R^-T`.
    """
    q, r = torch.linalg.qr(sketch_PM)
    pivots = r.diagonal()
    least = torch.finfo(r.dtype).eps * float(pivots.abs().max()) or 1.0  # a sketch without full rank: nothing is lost along its null space
    regular = r + torch.diag_embed(torch.where(pivots.abs() < least, least - pivots, 0.0))
    s = torch.linalg.solve_triangular(regular.mT, torch.eye(r.shape[0], dtype=r.dtype, device=r.device), upper=False)
    return q, r, torch.nn.functional.normalize(s, dim=0)


def _hutchinson(operator: CurvatureOperator, probes: Tensor) -> TraceEstimate:
    samples = (probes.T * operator.matmat(probes.T)).sum(0, dtype=torch.float64)
    return TraceEstimate(*mean_and_error(samples), probes.shape[0])


def _hutchpp(operator: CurvatureOperator, probes: Tensor) -> TraceEstimate:
    half = probes.shape[0] // 2
    q = torch.linalg.qr(operator.matmat(probes[:half].T))[0]
    exact = float((q * operator.matmat(q)).sum(dtype=torch.float64))
    rest = probes[half:].T - q @ (q.T @ probes[half:].T)
    value, error = mean_and_error((rest * operator.matmat(rest)).sum(0, dtype=torch.float64))
    return TraceEstimate(exact + value, error, half + q.shape[1] + probes.shape[0] - half)


def _xtrace(operator: CurvatureOperator, probes: Tensor) -> TraceEstimate:
    q, r, s = leave_one_out(operator.matmat(probes.T))
    h = (q.T @ operator.matmat(q)).double()
    w, r, s = (q.T @ probes.T).double(), r.double(), s.double()
    x = w - s * (s * w).sum(0)  # the probe's part along the range that is left
    samples = h.trace() - (s * (h @ s)).sum(0) + (w * r).sum(0) - 2 * (x * r).sum(0) + (x * (h @ x)).sum(0)
    return TraceEstimate(*mean_and_error(samples), 2 * probes.shape[0])


def trace(
    operator: CurvatureOperator,
    *,
    num_matvecs: int = 99,
    method: Literal["hutch++", "hutchinson", "xtrace"] = "hutch++",
    probes: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """Estimate the trace of a symmetric operator from products with random signs.

    "hutchinson" averages `zᵀAz`; "hutch++" takes the trace on the range of a sketch exactly and samples the rest, a third of the products
    each; "xtrace" leaves each probe once out of the sketch and samples with it. The standard error is that of the samples.

    Args:
        operator: symmetric, (P, P).
        num_matvecs: products to spend; at least 1, 3 for "hutch++" and 4 for "xtrace", which spend multiples of 3 and 2.
        method: the estimator.
        probes: rows are probes, (R, P), instead of random ones: R products for "hutchinson"; an even R for "hutch++", the first half the
            sketch; 2 R products for "xtrace".
        generator: of the probes.

    Raises: TypeError, ValueError for too few products or probes.
    Source: Hutchinson 1989; Meyer et al. 2021, "Hutch++"; Epperly, Tropp, Webber 2024, "XTrace".
    """
    checks.choice("method", method, ("hutch++", "hutchinson", "xtrace"))
    budget, least = checks.positive_int("num_matvecs", num_matvecs), {"hutch++": 3, "hutchinson": 1, "xtrace": 4}[method]
    if budget < least:
        raise ValueError(f"num_matvecs: expected at least {least} for {method!r}, got {num_matvecs}")
    if probes is None:
        size = operator.shape[0]
        count = {"hutch++": 2 * min(budget // 3, size), "hutchinson": budget, "xtrace": min(budget // 2, size)}[method]
        probes = rademacher(count, operator, generator)
    else:
        probes = given(probes, operator)
        if method == "hutch++" and probes.shape[0] % 2:
            raise ValueError(f"probes: expected an even number of rows for 'hutch++', got {probes.shape[0]}")
    with torch.no_grad():
        estimate = {"hutch++": _hutchpp, "hutchinson": _hutchinson, "xtrace": _xtrace}[method](operator, probes)
    if math.isnan(estimate.value):
        raise ValueError("operator: expected finite products, got NaN")
    return estimate
