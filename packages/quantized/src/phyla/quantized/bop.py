"""Bop, the optimizer of binary weights that has no real weights behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from phyla.quantized.functional.clip_mask import hard_sign
from phyla.shared import checks


class Bop(torch.optim.Optimizer):
    """Flips a binary weight when the running mean of its gradient keeps asking for it.

    m becomes (1 - gamma) m + gamma g; a weight w changes its sign where abs(m) > threshold and m has the sign of w. The parameters are
    stored as -1 and +1: those that are given to the optimizer are replaced by their signs at once. Give it the weights of binary layers
    only, and the other parameters of a model to another optimizer.

    Args:
        params: Parameters, or groups of them; a group may have its own `lr` and `threshold`.
        lr: gamma, the adaptivity rate, in (0, 1]; called so for the learning-rate schedulers, which should decay it.
        threshold: Size of the mean gradient from which a weight flips, at least 0.

    Raises:
        TypeError, ValueError: If a number is outside its range.

    Source: "Latent Weights Do Not Exist: Rethinking Binarized Neural Network Optimization", algorithm 1.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-4, *, threshold: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "threshold": threshold})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer` does; its parameters become their signs.

        Raises:
            TypeError, ValueError: If a number of the group is outside its range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        checks.in_range("lr", group["lr"], 0.0, 1.0, low_open=True)
        checks.in_range("threshold", group["threshold"], 0.0)
        with torch.no_grad():
            for parameter in group["params"]:
                parameter.copy_(hard_sign(checks.floating("params", parameter)))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step over all parameters that have a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Raises:
            ValueError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if weight.grad.is_sparse:
                    raise ValueError("params: expected dense gradients, got a sparse one")
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, group["lr"])
                weight.copy_(torch.where(mean * weight > group["threshold"], -weight, weight))
        return loss
