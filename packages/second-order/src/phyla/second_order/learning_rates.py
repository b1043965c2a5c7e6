"""What curvature allows: largest stable learning rates, and scaling with the batch size."""

from __future__ import annotations

import math
from typing import Literal

from phyla.shared import checks

__all__ = ["max_learning_rate", "optimal_sgd", "scale_learning_rate"]


def max_learning_rate(
    lambda_max: float, *, optimizer: Literal["sgd", "adam"] = "sgd", momentum: float = 0.0, nesterov: bool = False, beta1: float = 0.9
) -> float:
    """The largest learning rate that is stable on a quadratic of curvature `lambda_max`.

    SGD `2 (1 + μ) / λ`, with Nesterov's momentum `2 (1 + μ) / ((1 + 2μ) λ)`; Adam at a frozen second moment
    `2 (1 + β₁) / ((1 - β₁) λ)`, λ the top eigenvalue of `PreconditionedOperator(H, adam_preconditioner(optimizer))`.

    Args:
        lambda_max: largest eigenvalue, positive.
        optimizer: "sgd" or "adam".
        momentum: μ of SGD, in [0, 1).
        nesterov: whether SGD's momentum is Nesterov's.
        beta1: β₁ of Adam, in [0, 1).

    Raises: TypeError, ValueError for arguments outside their ranges.
    Source: Polyak 1964; Cohen et al. 2022, "Adaptive Gradient Methods at the Edge of Stability".
    """
    checks.in_range("lambda_max", lambda_max, 0.0, low_open=True)
    checks.in_range("momentum", momentum, 0.0, 1.0, high_open=True)
    checks.in_range("beta1", beta1, 0.0, 1.0, high_open=True)
    if checks.choice("optimizer", optimizer, ("sgd", "adam")) == "adam":
        return 2 * (1 + beta1) / ((1 - beta1) * lambda_max)
    return 2 * (1 + momentum) / ((1 + 2 * momentum if nesterov else 1) * lambda_max)


def optimal_sgd(lambda_max: float, lambda_min: float) -> tuple[float, float]:
    """Polyak's learning rate and heavy-ball momentum, the fastest on quadratics with curvature in [lambda_min, lambda_max].

    Returns: `(2 / (√λ₁ + √λₙ))²` and `((√λ₁ - √λₙ) / (√λ₁ + √λₙ))²`.
    Raises: TypeError, ValueError unless `0 < lambda_min <= lambda_max`.
    Source: Polyak 1964, "Some methods of speeding up the convergence of iteration methods".
    """
    checks.in_range("lambda_max", lambda_max, 0.0, low_open=True)
    checks.in_range("lambda_min", lambda_min, 0.0, lambda_max, low_open=True)
    high, low = math.sqrt(lambda_max), math.sqrt(lambda_min)
    return (2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2


def scale_learning_rate(lr: float, batch_size: int, new_batch_size: int, *, rule: Literal["linear", "sqrt"] = "linear") -> float:
    """A learning rate carried to another batch size: in proportion ("linear") or by the square root ("sqrt", for Adam-like methods).

    Raises: TypeError, ValueError for arguments that are not positive.
    """
    checks.in_range("lr", lr, 0.0, low_open=True)
    ratio = checks.positive_int("new_batch_size", new_batch_size) / checks.positive_int("batch_size", batch_size)
    return lr * (ratio if checks.choice("rule", rule, ("linear", "sqrt")) == "linear" else math.sqrt(ratio))
