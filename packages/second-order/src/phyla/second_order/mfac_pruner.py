"""Optimal Brain Surgeon pruning of a model with the empirical Fisher matrix of its mini-batch gradients."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from phyla.second_order.functional.mfac import fisher_quadratic, obs_prune
from phyla.second_order.inverse_fisher import check_damping
from phyla.shared import checks

__all__ = ["MFACPruner", "PruneResult"]

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class PruneResult:
    """What a call of `MFACPruner.prune` did.

    Attributes:
        masks: True where a weight is kept, by parameter name.
        sparsity: fraction of the prunable weights that is zero now.
        num_pruned: prunable weights that are zero now.
        predicted_loss_increase: ½ δᵀFδ of the change of the weights that was made, summed over the recomputations.
    """

    masks: dict[str, Tensor]
    sparsity: float
    num_pruned: int
    predicted_loss_increase: float


class MFACPruner:
    """Removes the weights with the least Optimal Brain Surgeon saliency, and moves the rest to make up for them.

    The model is in eval mode while gradients are collected; its mode and its `.grad`s are left as they were.

    Args:
        model: whose parameters are changed in place.
        loss_fn: (outputs, targets) -> scalar mean over the batch.
        data: (inputs, targets), sampled in batches of `batch_size` with replacement; or an iterable of such pairs, used as they come, again
            and again.
        params: names of the prunable parameters, or a choice by name; None for all with two dimensions or more.
        num_grads: mini-batch gradients m in the Fisher matrix.
        batch_size: of the batches sampled from a pair of tensors.
        damping: the multiple of the identity in the Fisher matrix.
        block_size: the matrix is block-diagonal over ranges of so many kept weights; None for one block.
        compensation: see `functional.obs_prune`.
        generator: of the sampling.

    Attributes:
        masks: True where a weight is kept, by parameter name; weights that are zero at construction are not.

    Raises: TypeError, ValueError: naming the argument.
    Source: M-FAC, section 3.2 and the pruning recipe of its experiments; see `functional.obs_prune`.
    """

    masks: dict[str, Tensor]

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
        *,
        params: Iterable[str] | Callable[[str], bool] | None = None,
        num_grads: int = 64,
        batch_size: int = 32,
        damping: float = 1e-5,
        block_size: int | None = None,
        compensation: Literal["joint", "independent"] = "joint",
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.num_grads, self.batch_size = checks.positive_int("num_grads", num_grads), checks.positive_int("batch_size", batch_size)
        self.damping = check_damping(damping)
        self.block_size = None if block_size is None else checks.positive_int("block_size", block_size)
        self.compensation: Literal["joint", "independent"] = compensation
        checks.choice("compensation", compensation, ("joint", "independent"))
        self._parameters = _chosen(model, params)
        self.masks = {name: parameter.detach() != 0 for name, parameter in self._parameters.items()}
        self._batches = _batches(data, self.batch_size, generator)
        self._handles: list[Any] = []

    def prune(self, sparsity: float, *, num_recomputes: int = 1) -> PruneResult:
        """Prune to a sparsity.

        Args:
            sparsity: fraction of the prunable weights that is zero afterwards, below 1; not less than now.
            num_recomputes: n steps through the densities r0 (r1/r0)^(i/n), each with gradients at the weights of that moment.

        Returns: PruneResult.
        Raises: TypeError, ValueError: naming the argument; gradients that are not finite.
        """
        checks.positive_int("num_recomputes", num_recomputes)
        checks.in_range("sparsity", sparsity, 0, 1, high_open=True)
        total = sum(mask.numel() for mask in self.masks.values())
        gone = total - self._num_kept()
        if round(sparsity * total) < gone:
            raise ValueError(f"sparsity: expected a number in [{gone / total:.6g}, 1), since so much is zero already, got {sparsity}")
        start, increase = 1 - gone / total, 0.0
        for i in range(1, num_recomputes + 1):
            reached = sparsity if i == num_recomputes else 1 - start * ((1 - sparsity) / start) ** (i / num_recomputes)
            number = round(reached * total) - (total - self._num_kept())
            if number > 0:
                increase += self._prune_some(number)
        self.apply_masks()
        gone = total - self._num_kept()
        return PruneResult({name: mask.clone() for name, mask in self.masks.items()}, gone / total, gone, increase)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Set the pruned weights to zero again; call it after each fine-tuning step."""
        for name, parameter in self._parameters.items():
            parameter.masked_fill_(~self.masks[name], 0)

    def register_hooks(self) -> None:
        """Mask the gradients of the prunable parameters from now on, so that plain gradient steps keep pruned weights at zero."""
        for handle in self._handles:
            handle.remove()
        self._handles = [self._mask_gradients(name, parameter) for name, parameter in self._parameters.items()]

    def _mask_gradients(self, name: str, parameter: Any) -> Any:
        return parameter.register_hook(lambda grad: grad * self.masks[name])

    def _num_kept(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    def _prune_some(self, number: int) -> float:
        """Prune so many of the kept weights, in one step; ½ δᵀFδ of it."""
        with torch.no_grad():
            weights = self._kept({name: parameter.detach() for name, parameter in self._parameters.items()})
        grads = self._collect(weights)
        keep, new = obs_prune(
            weights, grads, num_prune=number, damping=self.damping, block_size=self.block_size, compensation=self.compensation
        )
        sizes = [int(mask.sum()) for mask in self.masks.values()]
        with torch.no_grad():
            for (name, parameter), values, kept in zip(
                self._parameters.items(), torch.split(new, sizes), torch.split(keep, sizes), strict=True
            ):
                parameter.masked_scatter_(self.masks[name], values.to(parameter.dtype))
                self.masks[name] = self.masks[name].masked_scatter(self.masks[name], kept)
        return float(fisher_quadratic(grads, new.double() - weights.double(), damping=self.damping, block_size=self.block_size))

    def _kept(self, tensors: dict[str, Tensor]) -> Tensor:
        """The kept entries as one vector, in the order of the parameters."""
        parts = [tensors[name][mask] for name, mask in self.masks.items()]
        return torch.cat([part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts])

    def _collect(self, weights: Tensor) -> Tensor:
        """Gradients of `num_grads` batches over the kept weights, (m, kept)."""
        grads = weights.new_empty(self.num_grads, weights.numel())
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            for row in grads:
                inputs, targets = next(self._batches)
                with torch.enable_grad():
                    loss = self.loss_fn(self.model(inputs), targets)
                if loss.dim():
                    raise ValueError(f"loss_fn: expected a scalar, got shape {tuple(loss.shape)}")
                found = torch.autograd.grad(loss, list(self._parameters.values()), materialize_grads=True)
                row.copy_(self._kept(dict(zip(self._parameters, found, strict=True))))
        finally:
            for module, training in modes.items():
                module.training = training
        return grads


def _chosen(model: nn.Module, params: Iterable[str] | Callable[[str], bool] | None) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: parameter for name, parameter in named.items() if parameter.dim() >= 2}
    elif callable(params):
        chosen = {name: parameter for name, parameter in named.items() if params(name)}
    else:
        wanted = {params} if isinstance(params, str) else set(params)
        for name in sorted(wanted - named.keys()):
            near = difflib.get_close_matches(name, named, n=3)
            raise ValueError(f"params: expected names of parameters, got {name!r}" + (f" (close: {', '.join(near)})" if near else ""))
        chosen = {name: parameter for name, parameter in named.items() if name in wanted}
    if not chosen:
        raise ValueError("params: expected at least one prunable parameter, got none")
    for name, parameter in chosen.items():
        if not parameter.requires_grad:
            raise ValueError(f"params: expected parameters that require gradients, got {name!r} with requires_grad=False")
    return chosen


def _batches(
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]], batch_size: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end."""
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        inputs, targets = data
        if len(inputs) == 0 or len(inputs) != len(targets):
            raise ValueError(f"data: expected as many inputs as targets, at least one, got {len(inputs)} and {len(targets)}")
        return _sampled(inputs, targets, batch_size, generator)
    return _cycled(data)


def _sampled(inputs: Tensor, targets: Tensor, batch_size: int, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        device = inputs.device if generator is None else generator.device
        index = torch.randint(len(inputs), (batch_size,), generator=generator, device=device).to(inputs.device)
        yield inputs[index], targets[index.to(targets.device)]


def _cycled(data: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "data: expected an iterable of batches that can be gone through again and again, got one that is empty or used up"
            )
