"""How far the Hessian of a mini-batch strays from that of the data, and what that does to its extreme eigenvalues.

Model: a batch Hessian is the full one plus a Wigner matrix whose entries have variance `σ² / 𝔟`, 𝔟 the effective batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from phyla.second_order.eigsh import eigsh
from phyla.second_order.ggn import GGNOperator
from phyla.second_order.hessian import HessianOperator
from phyla.second_order.model_operator import LossFn
from phyla.second_order.probes import given, rademacher
from phyla.shared import checks

__all__ = ["HessianNoise", "batch_extremes", "effective_batch_size", "estimate_hessian_noise"]

_GROUPS = 8  # of batches, for the jackknife error


def effective_batch_size(batch_size: int, dataset_size: int | None = None) -> float:
    """`𝔟 = B / (1 - B/N)`, for batches drawn without replacement; B if N is not known, infinite at B = N.

    Raises: TypeError, ValueError for a batch size outside [1, N].
    """
    size = checks.positive_int("batch_size", batch_size)
    if dataset_size is None:
        return float(size)
    total = checks.positive_int("dataset_size", dataset_size)
    checks.in_range("batch_size", size, 1, total)
    return math.inf if size == total else size / (1 - size / total)


@dataclass(frozen=True)
class HessianNoise:
    """The noise of a batch Hessian.

    Attributes:
        sigma: standard deviation of an entry for a single example.
        num_parameters: P.
        dataset_size: N, None if not known.
        batch_size: at which it was measured.
        stderr: standard error of sigma, by a jackknife over groups of batches; infinite for fewer than three batches.
    """

    sigma: float
    num_parameters: int
    dataset_size: int | None
    batch_size: int
    stderr: float

    def scale_at(self, batch_size: int) -> float:
        """`s(B) = σ √(P / 𝔟)`, half the width of the bulk that the noise alone has at batch size B."""
        return self.sigma * math.sqrt(self.num_parameters / effective_batch_size(batch_size, self.dataset_size))


def estimate_hessian_noise(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    curvature: Literal["hessian", "ggn"] = "hessian",
    direction: Literal["random", "top"] = "random",
    probes: Tensor | None = None,
    num_probes: int = 1,
    generator: torch.Generator | None = None,
) -> HessianNoise:
    """Measure the noise along unit vectors z: `s(B₀)² = mean_b ‖H_b z‖² - ‖mean_b H_b z‖²`, averaged over z.

    Noise along the top eigenvector predicts the inflation of the top eigenvalue of real networks, isotropic noise underestimates it.

    Args:
        model: in the mode in which it is meant; see `HessianOperator`.
        loss_fn: (outputs, targets) -> scalar, the mean over the batch.
        data: at least two batches (inputs, targets) of one size; together they are the data set.
        curvature: of the Hessian or of the Gauss-Newton matrix.
        direction: random signs, or the top eigenvector of all data.
        probes: rows are directions, (R, P), instead; they are normalised.
        num_probes: random directions.
        generator: of the directions.

    Raises: TypeError, ValueError for unequal or fewer than two batches, besides what `HessianOperator` raises.
    """
    make = {"hessian": HessianOperator, "ggn": GGNOperator}[checks.choice("curvature", curvature, ("hessian", "ggn"))]
    checks.choice("direction", direction, ("random", "top"))
    batches = list(data)
    whole = make(model, loss_fn, batches)
    parts = [make(model, loss_fn, [batch], check_deterministic=False) for batch in batches]
    sizes = [part.num_data for part in parts]
    if len(sizes) < 2 or len(set(sizes)) > 1:
        raise ValueError(f"data: expected at least two batches of one size, got sizes {sizes}")
    if probes is not None:
        directions = given(probes, whole)
    elif direction == "top":
        directions = eigsh(whole, 1, generator=generator).eigenvectors.T
    else:
        directions = rademacher(checks.positive_int("num_probes", num_probes), whole, generator)
    z_PR = torch.nn.functional.normalize(directions, dim=1).T
    groups = min(_GROUPS, len(parts))
    sums, counts = z_PR.new_zeros(groups, *z_PR.shape), torch.zeros(groups, dtype=torch.float64)
    squares = torch.zeros(groups, dtype=torch.float64)
    for index, part in enumerate(parts):
        product = part.matmat(z_PR)
        sums[index % groups] += product
        squares[index % groups] += float(product.double().square().sum())
        counts[index % groups] += 1
    unit = math.sqrt(effective_batch_size(sizes[0], sum(sizes)) / whole.shape[0])
    sigma = unit * math.sqrt(_spread(sums.sum(0), float(squares.sum()), len(parts)))
    if len(parts) < 3:
        return HessianNoise(sigma, whole.shape[0], sum(sizes), sizes[0], math.inf)
    left = [  # without one group, each corrected for its number of batches
        math.sqrt(_spread(sums.sum(0) - sums[g], float(squares.sum() - squares[g]), n) * n / (n - 1))
        for g in range(groups)
        for n in [len(parts) - int(counts[g])]
    ]
    jackknife = torch.tensor(left, dtype=torch.float64).std(correction=0) * math.sqrt(groups - 1)
    return HessianNoise(sigma, whole.shape[0], sum(sizes), sizes[0], unit * float(jackknife))


def _spread(total_PR: Tensor, squares: float, batches: int) -> float:
    """`mean ‖H_b z‖² - ‖mean H_b z‖²`, averaged over the directions."""
    centre = float((total_PR.double() / batches).square().sum())
    return max(squares / batches - centre, 0.0) / total_PR.shape[1]


def batch_extremes(
    lambda_max: float,
    lambda_min: float,
    noise: HessianNoise,
    batch_size: int,
    *,
    ensemble: Literal["wigner", "marchenko_pastur"] = "wigner",
) -> tuple[float, float]:
    """The extreme eigenvalues of a batch Hessian, from those of the full one.

    "wigner": with `s = noise.scale_at(B)`, an eigenvalue beyond the bulk's edge moves out to `λ + s²/λ`, one inside disappears in the bulk,
    which ends at ±2s. "marchenko_pastur", for Gauss-Newton matrices: with `q = P/𝔟` and the variance `v = σ²`, the top goes to
    `λ (1 + q v / (λ - v))` or the edge `v (1 + √q)²`; the bottom, which no noise makes negative, to the edge `v (1 - √q)²`, 0 for `q >= 1`.

    Returns: largest, smallest.
    Raises: TypeError, ValueError if `lambda_max < lambda_min`.
    Source: "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training";
        Baik, Ben Arous, Péché 2005 for the second.
    """
    checks.choice("ensemble", ensemble, ("wigner", "marchenko_pastur"))
    checks.in_range("lambda_max", lambda_max)
    checks.in_range("lambda_min", lambda_min, None, lambda_max)
    if ensemble == "wigner":
        s = noise.scale_at(batch_size)
        top = lambda_max + s**2 / lambda_max if lambda_max > s else 2 * s
        bottom = lambda_min + s**2 / lambda_min if lambda_min < -s else -2 * s
        return top, bottom
    q, v = noise.num_parameters / effective_batch_size(batch_size, noise.dataset_size), noise.sigma**2
    root = math.sqrt(q)
    top = lambda_max * (1 + q * v / (lambda_max - v)) if lambda_max > v * (1 + root) else v * (1 + root) ** 2
    return top, v * max(1 - root, 0.0) ** 2
