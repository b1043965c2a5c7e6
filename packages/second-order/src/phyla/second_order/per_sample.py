"""Gradients of single examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from phyla.second_order.model_operator import LossFn, Select, constants, count_examples, mean_loss, select_parameters, take
from phyla.shared import checks

__all__ = ["per_sample_gradients"]

_func: Any = torch.func  # torch leaves these functions untyped


def per_sample_gradients(
    model: nn.Module, loss_fn: LossFn, inputs: Any, targets: Any, *, params: Select = None, chunk_size: int | None = None
) -> Tensor:
    """The gradient of each example's loss, as rows.

    Args:
        model: works under `torch.func.vmap`: no BatchNorm or dropout in train mode.
        loss_fn: (outputs, targets) -> scalar; it sees a batch of one.
        inputs: a tensor, or tuples, lists and dicts of tensors, whose first dimension counts the B examples.
        targets: like `inputs`.
        params: names of the parameters, or a predicate on names; default all that require gradients.
        chunk_size: examples at once; default all.

    Returns: (B, P).
    Raises: TypeError, ValueError for an empty batch, a loss that is no scalar, or an unknown name.
    """
    chosen = {name: p.detach() for name, p in select_parameters(model, params).items()}
    count = count_examples(targets) or count_examples(inputs)
    if not count:
        raise ValueError("inputs: expected at least one example, got none")
    step = count if chunk_size is None else checks.positive_int("chunk_size", chunk_size)
    rest = constants(model)

    def loss(theta: dict[str, Tensor], x: Any, y: Any) -> Tensor:
        return mean_loss(loss_fn, functional_call(model, {**rest, **theta}, (x,)), y)

    def singles(value: Any) -> Any:
        """Batches of one: (B, ...) becomes (B, 1, ...)."""
        if isinstance(value, Tensor):
            return value.unsqueeze(1)
        return {k: singles(v) for k, v in value.items()} if isinstance(value, dict) else type(value)(singles(v) for v in value)

    gradient = _func.vmap(_func.grad(loss), in_dims=(None, 0, 0))
    result = next(iter(chosen.values())).new_empty(count, sum(p.numel() for p in chosen.values()))
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        grads = gradient(chosen, singles(take(inputs, rows)), singles(take(targets, rows)))
        torch.cat([grads[name].flatten(1) for name in chosen], 1, out=result[rows])
    return result
