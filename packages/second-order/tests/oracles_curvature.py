"""Dense float64 references, straight from the equations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

GOLDEN = Path(__file__).parent / "golden"


def symmetric(size: int, seed: int = 0, *, positive: bool = False) -> Tensor:
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / size if positive else (a + a.T) / 2


def hutchpp(a: Tensor, sketch: Tensor, probes: Tensor) -> float:
    """tr QᵀAQ + mean of zᵀ(I-QQᵀ)A(I-QQᵀ)z; rows of sketch and probes are vectors."""
    q = torch.linalg.qr(a @ sketch.T)[0]
    rest = torch.eye(len(a), dtype=a.dtype) - q @ q.T
    return float((q.T @ a @ q).trace() + torch.stack([z @ rest @ a @ rest @ z for z in probes]).mean())


def leave_one_out(a: Tensor, probes: Tensor) -> tuple[list[float], Tensor]:
    """XTrace's samples and XDiag's estimate, one QR factorisation a probe left out."""
    samples, diagonals = [], []
    for i, z in enumerate(probes):
        others = torch.cat([probes[:i], probes[i + 1 :]])
        q = torch.linalg.qr(a @ others.T)[0]
        p = q @ q.T
        rest = torch.eye(len(a), dtype=a.dtype) - p
        samples.append(float((q.T @ a @ q).trace() + z @ rest @ a @ rest @ z))
        diagonals.append((p @ a).diagonal() + z * (rest @ a @ z))
    return samples, torch.stack(diagonals).mean(0)


def dense_curvature(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Tensor, targets: Tensor, names: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Hessian, GGN, empirical Fisher and per-sample gradients of the mean loss, from Jacobians of the flat parameters."""
    named = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}
    sizes, shapes = [p.numel() for p in named.values()], [p.shape for p in named.values()]

    def outputs(theta: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(theta.split(sizes), shapes, strict=True)]
        result: Tensor = functional_call(model, dict(zip(named, parts, strict=True)), (inputs,))
        return result

    theta = torch.cat([p.flatten() for p in named.values()])
    jac: Any = torch.autograd.functional.jacobian
    hess: Any = torch.autograd.functional.hessian
    f = outputs(theta)
    j = jac(outputs, theta).reshape(f.numel(), -1)
    outer = hess(lambda u: loss_fn(u, targets), f).reshape(f.numel(), -1)
    grads = torch.stack([jac(lambda t, i=i: loss_fn(outputs(t)[i : i + 1], targets[i : i + 1]), theta) for i in range(len(f))])
    return {
        "hessian": hess(lambda t: loss_fn(outputs(t), targets), theta),
        "ggn": j.T @ outer @ j,
        "empirical_fisher": grads.T @ grads / len(f),
        "per_sample_gradients": grads,
        "gradient": jac(lambda t: loss_fn(outputs(t), targets), theta),
    }


def golden_model(data: dict[str, Tensor]) -> nn.Sequential:
    wide, hidden, out = (int(n) for n in data["sizes"])
    model = nn.Sequential(nn.Linear(wide, hidden), nn.Tanh(), nn.Linear(hidden, out)).double()
    model.load_state_dict({name.removeprefix("param."): value for name, value in data.items() if name.startswith("param.")})
    return model


def wasserstein(nodes: Tensor, weights: Tensor, eigenvalues: Tensor) -> float:
    """Wasserstein-1 distance of a discrete measure and the spectrum."""
    points = torch.cat([nodes.flatten(), eigenvalues])
    masses = torch.cat([weights.flatten() / weights.sum(), torch.full_like(eigenvalues, -1 / len(eigenvalues))])
    order = points.argsort()
    return float(np.sum(np.abs(np.cumsum(masses[order].numpy())[:-1]) * np.diff(points[order].numpy())))
