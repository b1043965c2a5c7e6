"""Stochastic estimates of the diagonal."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from phyla.second_order.operator import CurvatureOperator
from phyla.second_order.probes import rademacher
from phyla.second_order.trace import leave_one_out
from phyla.shared import checks

__all__ = ["diagonal"]


def diagonal(
    operator: CurvatureOperator,
    *,
    num_matvecs: int = 100,
    method: Literal["xdiag", "hutchinson"] = "xdiag",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the diagonal of a symmetric operator from products with random signs.

    "hutchinson" averages `z * Az`; "xdiag" takes the diagonal on the range of a sketch exactly, each probe
    in turn left out of it for the rest.

    Args:
        operator: symmetric, (P, P).
        num_matvecs: products to spend; at least 1, 2 for "xdiag", which spends an even number.
        method: the estimator.
        generator: of the probes.

    Returns: (P,).
    Raises: TypeError, ValueError for too few products.
    Source: Bekas, Kokiopoulou, Saad 2007; Epperly, Tropp, Webber 2024, "XTrace", section 2.4 (XDiag).
    """
    checks.choice("method", method, ("xdiag", "hutchinson"))
    budget, least = checks.positive_int("num_matvecs", num_matvecs), 2 if method == "xdiag" else 1
    if budget < least:
        raise ValueError(f"num_matvecs: expected at least {least} for {method!r}, got {num_matvecs}")
    count = min(budget // 2, operator.shape[0]) if method == "xdiag" else budget
    with torch.no_grad():
        probes = rademacher(count, operator, generator).T
        products = operator.matmat(probes)
        if method == "hutchinson":
            return (probes * products).mean(1)
        q, r, s = leave_one_out(products)
        z, lost = operator.matmat(q), q @ s
        seen = (q * z).sum(1) - (lost * (z @ s)).mean(1)
        return seen + (probes * lost * (s * r).sum(0)).mean(1)
