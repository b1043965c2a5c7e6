"""Noise of the batch Hessian, extreme eigenvalues of batches, and learning rates."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles_curvature import GOLDEN, golden_model, symmetric
from torch import Tensor, nn

from phyla.second_order import (
    HessianNoise,
    batch_extremes,
    effective_batch_size,
    estimate_hessian_noise,
    max_learning_rate,
    optimal_sgd,
    scale_learning_rate,
)
from phyla.shared.testing import load_golden


class Quadratic(nn.Module):
    """Per-sample losses `½ θᵀ A_n θ`: the outputs are the losses, the inputs the matrices."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(size, dtype=torch.float64))

    def forward(self, matrices: Tensor) -> Tensor:
        return 0.5 * (matrices @ self.theta) @ self.theta


def noisy(size: int = 60, count: int = 300, sigma: float = 0.35) -> Tensor:
    g = torch.randn(count, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = torch.zeros(size, dtype=torch.float64)
    base[:3] = torch.tensor([6.0, 3.0, -4.0])
    return torch.diag(base) + sigma * (g + g.mT) / math.sqrt(2)


def batches(matrices: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part))) for part in torch.split(matrices, size)]


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()


def test_golden_noise() -> None:
    data = load_golden(GOLDEN / "hessian_noise.npz")
    size = int(data["batch_size"])
    pairs = list(zip(data["inputs"].split(size), data["targets"].split(size), strict=True))
    noise = estimate_hessian_noise(golden_model(data), F.cross_entropy, pairs, probes=data["probe"][None])
    assert noise.scale_at(size) ** 2 == pytest.approx(float(data["hess_var"]), rel=1e-9)
    assert noise.sigma == pytest.approx(float(data["sigma"]), rel=1e-9)
    assert (noise.num_parameters, noise.dataset_size, noise.batch_size) == (51, 30, 5)


def test_golden_extremes() -> None:
    with np.load(GOLDEN / "batch_extremes.npz") as archive:
        rows = [dict(zip(archive["columns"].tolist(), row, strict=True)) for row in archive["table"]]
    for row in rows:
        size = int(row["batch_size"])
        noise = HessianNoise(row["sigma"], int(row["num_parameters"]), int(row["dataset_size"]), size, 0.0)
        assert noise.scale_at(size) == pytest.approx(row["scale"], rel=1e-12)
        expected = (row["batch_lambda_max"], row["batch_lambda_min"])
        assert batch_extremes(row["lambda_max"], row["lambda_min"], noise, size) == pytest.approx(expected, rel=1e-12)


def test_noisy_quadratic() -> None:
    matrices = noisy()
    noise = estimate_hessian_noise(Quadratic(60), mean, batches(matrices, 10), num_probes=3, generator=torch.Generator().manual_seed(1))
    assert noise.sigma == pytest.approx(0.35, rel=0.03)
    assert abs(noise.sigma - 0.35) < 5 * noise.stderr < 0.1
    full = torch.linalg.eigvalsh(matrices.mean(0))
    for size in (6, 20, 60, 150):
        parts = torch.stack([part.mean(0) for part in torch.split(matrices, size)])
        measured = torch.linalg.eigvalsh(parts).mean(0)
        top, bottom = batch_extremes(float(full[-1]), float(full[0]), noise, size)
        assert top == pytest.approx(float(measured[-1]), rel=0.06)
        assert bottom == pytest.approx(float(measured[0]), rel=0.06)
    assert noise.scale_at(300) == 0


def test_top_direction_and_curvature() -> None:
    matrices, model = noisy(12, 40), Quadratic(12)
    vector = torch.linalg.eigh(matrices.mean(0))[1][:, -1:]
    top = estimate_hessian_noise(model, mean, batches(matrices, 8), direction="top")
    along = estimate_hessian_noise(model, mean, batches(matrices, 8), probes=7 * vector.T)
    assert top.sigma == pytest.approx(along.sigma, rel=1e-5)
    assert estimate_hessian_noise(model, mean, batches(matrices, 8), curvature="ggn").sigma == 0  # the outputs enter linearly
    assert math.isinf(estimate_hessian_noise(model, mean, batches(matrices, 20)).stderr)


def test_marchenko_pastur_edges() -> None:
    size, count, sigma2 = 200, 800, 0.6
    rows = math.sqrt(sigma2) * torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = HessianNoise(math.sqrt(sigma2), size, None, count, 0.0)
    values = torch.linalg.eigvalsh(rows.T @ rows / count)
    assert batch_extremes(sigma2, sigma2, noise, count, ensemble="marchenko_pastur") == pytest.approx(
        (float(values[-1]), float(values[0])), rel=0.08
    )
    rows[:, 0] *= math.sqrt(5 / sigma2)
    top = float(torch.linalg.eigvalsh(rows.T @ rows / count)[-1])
    assert batch_extremes(5.0, sigma2, noise, count, ensemble="marchenko_pastur")[0] == pytest.approx(top, rel=0.1)
    assert batch_extremes(5.0, 0.0, noise, 20, ensemble="marchenko_pastur")[1] == 0


def diverges(optimizer: torch.optim.Optimizer, x: nn.Parameter, curvature: Tensor, steps: int = 3000) -> bool:
    for _ in range(steps):
        x.grad = curvature @ x.detach()
        optimizer.step()
        if not float(x.detach().norm()) < 1e6:
            return True
    return False


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_bounds_are_sharp(momentum: float, nesterov: bool) -> None:
    a = symmetric(4, positive=True) + 0.1 * torch.eye(4, dtype=torch.float64)
    bound = max_learning_rate(float(torch.linalg.eigvalsh(a)[-1]), momentum=momentum, nesterov=nesterov)
    for factor in (0.97, 1.03):
        x = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=factor * bound, momentum=momentum, nesterov=nesterov)
        assert diverges(optimizer, x, a) == (factor > 1)


def test_adam_bound_is_sharp() -> None:
    curvature, beta1 = 3.0, 0.9
    bound = max_learning_rate(curvature, optimizer="adam", beta1=beta1)
    for factor in (0.97, 1.03):  # Adam's iteration at a second moment of one
        x, m = 1.0, 0.0
        for _ in range(3000):
            m = beta1 * m + (1 - beta1) * curvature * x
            x -= factor * bound * m
            if abs(x) > 1e100:
                break
        assert (abs(x) > 1) == (factor > 1)


def test_polyak_pair_is_optimal() -> None:
    def rate(lr: float, mu: float) -> float:
        """Spectral radius of heavy ball on curvatures in [0.2, 5]."""
        steps = [np.array([[1 + mu - lr * c, -mu], [1.0, 0.0]]) for c in np.linspace(0.2, 5, 50)]
        return max(float(np.abs(np.linalg.eigvals(step)).max()) for step in steps)

    lr, mu = optimal_sgd(5.0, 0.2)
    assert rate(lr, mu) == pytest.approx(math.sqrt(mu), abs=1e-3)
    for other in ((1.05 * lr, mu), (0.95 * lr, mu), (lr, mu - 0.05), (lr, mu + 0.05)):
        assert rate(*other) > math.sqrt(mu) + 1e-3
    assert scale_learning_rate(0.1, 32, 128) == pytest.approx(0.4)
    assert scale_learning_rate(0.1, 32, 128, rule="sqrt") == pytest.approx(0.2)


def test_errors() -> None:
    matrices, model = noisy(4, 10), Quadratic(4)
    with pytest.raises(ValueError, match=r"data: expected at least two batches of one size, got sizes \[4, 4, 2\]"):
        estimate_hessian_noise(model, mean, batches(matrices, 4))
    with pytest.raises(ValueError, match=r"got sizes \[10\]"):
        estimate_hessian_noise(model, mean, batches(matrices, 10))
    with pytest.raises(ValueError, match="batch_size: expected a number in"):
        effective_batch_size(11, 10)
    assert (effective_batch_size(5), effective_batch_size(10, 10), effective_batch_size(5, 30)) == (5, math.inf, 6)
    with pytest.raises(ValueError, match="lambda_max: expected a number in"):
        max_learning_rate(0.0)
    with pytest.raises(ValueError, match="lambda_min: expected a number in"):
        optimal_sgd(1.0, 2.0)
