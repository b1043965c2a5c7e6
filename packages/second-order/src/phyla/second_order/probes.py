"""Random vectors for the stochastic estimators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phyla.second_order.operator import CurvatureOperator
from phyla.shared import checks

__all__: list[str] = []


def rademacher(count: int, operator: CurvatureOperator, generator: torch.Generator | None) -> Tensor:
    """Independent signs, (count, P), in the dtype and on the device of the operator; drawn where the generator lives."""
    place = torch.device("cpu") if generator is None else generator.device
    signs = torch.randint(0, 2, (count, operator.shape[0]), generator=generator, device=place, dtype=torch.int8)
    return signs.to(operator.device).to(operator.dtype).mul_(2).sub_(1)


def normal(operator: CurvatureOperator, generator: torch.Generator | None) -> Tensor:
    """A standard normal vector, (P,)."""
    place = torch.device("cpu") if generator is None else generator.device
    return torch.randn(operator.shape[0], generator=generator, device=place, dtype=torch.float64).to(operator.device, operator.dtype)


def given(probes: Tensor, operator: CurvatureOperator) -> Tensor:
    """Probes that the caller brought, checked: rows are probes, (R, P)."""
    checks.shape("probes", checks.floating("probes", probes), (None, operator.shape[0]))
    if not probes.shape[0]:
        raise ValueError("probes: expected at least one row, got none")
    return probes.to(operator.device, operator.dtype)


def mean_and_error(samples: Tensor) -> tuple[float, float]:
    """Mean of the samples (R,) and its standard error; infinite for one sample."""
    count = samples.shape[0]
    return float(samples.mean()), float(samples.std()) / math.sqrt(count) if count > 1 else math.inf
