"""Products with a tall stack of gradients, in float64 whatever the gradients' dtype, panel by panel so that no float64 copy of them exists.

Shapes: G is (..., m, d), the rows are gradients; leading dimensions are independent blocks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["cholesky", "column_panels", "expand", "factor_panels", "gram", "project"]

_CPU_PANEL, _DEVICE_PANEL = 1 << 20, 1 << 24  # entries of a float64 panel: 8 MB beside a cache, 128 MB where launches cost


def column_panels(grads: Tensor) -> list[slice]:
    """Ranges of columns that together cover G, each small enough to be converted to float64 at once."""
    d = grads.shape[-1]
    if grads.dtype == torch.float64 and not grads.is_cuda:
        return [slice(0, d)]
    width = max(1, (_CPU_PANEL if grads.device.type == "cpu" else _DEVICE_PANEL) // max(1, grads[..., :1].numel()))
    return [slice(start, min(start + width, d)) for start in range(0, d, width)]


def gram(grads: Tensor) -> Tensor:
    """G Gᵀ, (..., m, m) in float64."""
    total: Tensor = grads.new_zeros(*grads.shape[:-1], grads.shape[-2], dtype=torch.float64)
    for columns in column_panels(grads):
        panel = grads[..., columns].double()
        total = torch.add(total, panel @ panel.mT)
    return total


def project(grads: Tensor, x: Tensor) -> Tensor:
    """G x, (..., m, r) in float64 from x of shape (..., d, r)."""
    total: Tensor = grads.new_zeros(*grads.shape[:-1], x.shape[-1], dtype=torch.float64)
    for columns in column_panels(grads):
        total = torch.add(total, grads[..., columns].double() @ x[..., columns, :].double())
    return total


def expand(grads: Tensor, c: Tensor) -> Tensor:
    """Gᵀ c, (..., d, r) in float64 from c of shape (..., m, r)."""
    panels = [torch.matmul(grads[..., columns].double().mT, c) for columns in column_panels(grads)]
    return torch.cat(panels, -2)


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor of a damped Gram matrix. Raises: ValueError if float64 does not see it as positive definite."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        largest = float(matrix.detach().diagonal(dim1=-2, dim2=-1).max())
        raise ValueError(f"damping: expected one that float64 can add to squared gradient norms of {largest:.3g}, got a smaller one")
    return factor


def factor_panels(grads: Tensor, damping: float, lower: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The columns of W = damping^(-1/2) L⁻¹ G in float64, panel by panel, with the range of each."""
    for columns in column_panels(grads):
        yield columns, torch.linalg.solve_triangular(lower, grads[..., columns].double(), upper=False) * damping**-0.5
