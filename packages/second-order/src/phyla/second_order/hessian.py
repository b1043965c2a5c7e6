"""The Hessian of a model's mean loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phyla.second_order.model_operator import Data, LossFn, ModelOperator, Select, mean_loss, vjp
from phyla.shared import checks

__all__ = ["HessianOperator"]


class HessianOperator(ModelOperator):
    """The Hessian of `L(θ) = (1/N) Σ_n ℓ(f(x_n; θ), y_n)`, by products. Nothing is left in gradients, modes or buffers of the model.

    Args:
        model: called as `model(inputs)` in the mode it is in; put BatchNorm and dropout into eval mode.
        loss_fn: (outputs, targets) -> scalar, the mean over the batch.
        data: a pair (inputs, targets) or an iterable of such pairs; an iterator is drawn once and kept. Batches of `n_b` weigh `n_b / N`.
        params: names of the parameters, or a predicate on names; default all that require gradients.
        method: "autograd" differentiates twice; "finite_difference" takes `(∇L(θ + εv) - ∇L(θ - εv)) / 2ε`, for models without a second
            derivative, with `ε = eps^(1/3) (1 + ‖θ‖) / ‖v‖`.
        chunk_size: examples processed at once; default a batch.
        cache_graph: with data of a single chunk, keep its gradient's graph (memory of one pass) over products, about twice as fast.
            A change of the parameters after the first product makes torch raise; build a new operator.
        check_deterministic: compare two gradient passes, and raise where they differ.
        process_group: each rank holds its own shard of the data; products are summed over ranks.

    Raises: TypeError, ValueError for wrong arguments, empty data, a loss that is no scalar, an unknown name, or passes that differ.
    Source: Pearlmutter 1994, "Fast Exact Multiplication by the Hessian".
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Data,
        *,
        params: Select = None,
        method: Literal["autograd", "finite_difference"] = "autograd",
        chunk_size: int | None = None,
        cache_graph: bool = False,
        check_deterministic: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._method = checks.choice("method", method, ("autograd", "finite_difference"))
        super().__init__(
            model,
            loss_fn,
            data,
            params=params,
            chunk_size=chunk_size,
            cache_graph=cache_graph,
            check_deterministic=check_deterministic,
            process_group=process_group,
        )

    def _linearise(self, inputs: Any, targets: Any, index: int) -> Callable[[Tensor], Tensor]:
        leaves = self._leaves()
        loss = mean_loss(self.loss_fn, self._forward(inputs, leaves), targets)
        grads = list(torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True))
        return lambda rows: self._join(vjp(grads, leaves, self._split(rows)))

    def _products(self, rows: Tensor) -> Tensor:
        if self._method == "autograd":
            return super()._products(rows)
        return torch.stack([self._difference(row) for row in rows])

    def _difference(self, vector: Tensor) -> Tensor:
        norm = float(vector.norm())
        if norm == 0:
            return torch.zeros_like(vector)
        theta = [p.detach() for p in self._parameters.values()]
        size = float(torch.cat([t.flatten() for t in theta]).norm())
        step = torch.finfo(self.dtype).eps ** (1 / 3) * (1 + size) / norm
        direction = list(self.unflatten(vector).values())
        ahead, behind = (
            self._gradient([(t + sign * step * d).requires_grad_() for t, d in zip(theta, direction, strict=True)]) for sign in (1, -1)
        )
        product: Tensor = (ahead - behind) / (2 * step)
        return product
