"""Curvature of the form `(1/N) Σ_n J_nᵀ M_n J_n`, J the Jacobian of the outputs: Gauss-Newton, Fisher and empirical Fisher.

`J v` comes from differentiating `u ↦ Jᵀu`, which is linear, once more; both graphs are kept while many products are taken.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.second_order.model_operator import Data, LossFn, ModelOperator, Options, mean_loss, vjp
from phyla.shared import checks

__all__ = ["EmpiricalFisherOperator", "FisherOperator", "GGNOperator"]

Action = Callable[[Tensor], Tensor]


def loss_kind(loss_fn: LossFn) -> str | None:
    """ "ce", "mse" or "bce" for torch's own losses at a plain mean over the batch, else None."""
    functions: dict[Any, str] = {F.cross_entropy: "ce", F.mse_loss: "mse", F.binary_cross_entropy_with_logits: "bce"}
    modules: dict[type, str] = {nn.CrossEntropyLoss: "ce", nn.MSELoss: "mse", nn.BCEWithLogitsLoss: "bce"}
    if not isinstance(loss_fn, nn.Module):
        return functions.get(loss_fn)
    plain = getattr(loss_fn, "reduction", None) == "mean" and all(getattr(loss_fn, a, None) is None for a in ("weight", "pos_weight"))
    return modules.get(type(loss_fn)) if plain else None


def _closed_form(loss_fn: LossFn, outputs: Tensor, targets: Any) -> str | None:
    """The kind of loss if its output Hessian is the textbook one for these targets."""
    kind = loss_kind(loss_fn)
    if kind == "ce":
        if outputs.dim() < 2 or (not targets.is_floating_point() and bool((targets < 0).any())):
            return None  # ignored examples change the mean
    elif kind is not None and outputs.shape != targets.shape:
        return None
    return kind


def output_hessian(loss_fn: LossFn, outputs: Tensor, targets: Any) -> Action:
    """`u ↦ (∂²ℓ/∂f²) u` for the mean loss of a batch, u of shape (k, *outputs)."""
    f, kind = outputs.detach(), _closed_form(loss_fn, outputs, targets)
    if kind == "ce":
        p, examples = f.softmax(1), f.numel() / f.shape[1]
        return lambda u: (p * u - p * (p * u).sum(2, keepdim=True)) / examples
    if kind == "mse":
        return lambda u: u * (2 / f.numel())
    if kind == "bce":
        slope = f.sigmoid() * (-f).sigmoid() / f.numel()
        return lambda u: slope * u
    leaf = f.requires_grad_()
    (grad,) = torch.autograd.grad(mean_loss(loss_fn, leaf, targets), [leaf], create_graph=True, materialize_grads=True)
    return lambda u: vjp([grad], [leaf], [u])[0]


def rank_one(factors: Tensor) -> Action:
    """`u ↦ (1/N) Σ_s g_ns (g_ns · u_n)` for g of shape (S, N, ...), u of shape (k, N, ...)."""
    g = factors.flatten(2)

    def act(u: Tensor) -> Tensor:
        along = torch.einsum("snc,knc->ksn", g, u.flatten(2))
        return (torch.einsum("snc,ksn->knc", g, along) / g.shape[1]).view_as(u)

    return act


class _OutputOperator(ModelOperator):
    """`(1/N) Σ J_nᵀ M_n J_n`; a subclass gives `u ↦ M u` of a batch, divided by its number of examples."""

    @abc.abstractmethod
    def _middle(self, outputs: Tensor, targets: Any, index: int) -> Action: ...

    def _linearise(self, inputs: Any, targets: Any, index: int) -> Callable[[Tensor], Tensor]:
        leaves = self._leaves()
        outputs = self._forward(inputs, leaves)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"model: expected a Tensor as its output, got {type(outputs).__name__}")
        middle = self._middle(outputs, targets, index)
        dummy = torch.zeros_like(outputs, requires_grad=True)
        transposed = [part[0] for part in vjp([outputs], leaves, [dummy[None]], graph=True)]

        def act(rows: Tensor) -> Tensor:
            (forward,) = vjp(transposed, [dummy], self._split(rows))
            return self._join(vjp([outputs], leaves, [middle(forward)]))

        return act


class GGNOperator(_OutputOperator):
    """The generalised Gauss-Newton matrix `(1/N) Σ J_nᵀ (∂²ℓ/∂f²) J_n`, positive semi-definite for a convex loss.

    The output Hessian is closed for plain `cross_entropy`, `mse_loss` and `binary_cross_entropy_with_logits` (functions and modules);
    otherwise the loss is differentiated twice. Arguments are those of `HessianOperator`, without `method`; the model gives one Tensor.

    Source: Schraudolph 2002, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent".
    """

    def _middle(self, outputs: Tensor, targets: Any, index: int) -> Action:
        return output_hessian(self.loss_fn, outputs, targets)


class FisherOperator(_OutputOperator):
    """The Fisher matrix `(1/N) Σ J_nᵀ E_y[g g ᵀ] J_n`, g the gradient of the loss at a target y that the model itself draws.

    It equals the GGN for the losses that it knows: plain `cross_entropy`, `mse_loss`, `binary_cross_entropy_with_logits`.

    Args:
        num_samples: draws of the target for each example instead of the expectation; the same draws in every product.
        generator: of the draws.
    The others are those of `GGNOperator`.

    Raises: ValueError for a loss whose likelihood is not known, besides what `HessianOperator` raises.
    Source: Martens 2020, "New Insights and Perspectives on the Natural Gradient Method".
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Data,
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        **options: Unpack[Options],
    ) -> None:
        if loss_kind(loss_fn) is None:
            raise ValueError(f"loss_fn: expected plain cross_entropy, mse_loss or binary_cross_entropy_with_logits, got {loss_fn!r}")
        self._samples = None if num_samples is None else checks.positive_int("num_samples", num_samples)
        place = torch.device("cpu") if generator is None else generator.device
        self._seed = int(torch.randint(2**62, (), generator=generator, device=place)) if self._samples else 0
        super().__init__(model, loss_fn, data, **options)

    def _middle(self, outputs: Tensor, targets: Any, index: int) -> Action:
        if self._samples is None:
            return output_hessian(self.loss_fn, outputs, targets)
        return rank_one(self._draw(outputs.detach(), self._samples, torch.Generator().manual_seed(self._seed + index)))

    def _draw(self, f: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Gradients of the loss at drawn targets over sqrt(samples), (S, N, ...): their outer products average to the output Hessian."""
        kind, per_example = loss_kind(self.loss_fn), f[0].numel()
        if kind == "ce":
            per_example //= f.shape[1]  # positions of one example, over which the loss is a mean
            p = f.softmax(1).movedim(1, -1)
            drawn = torch.multinomial(p.reshape(-1, p.shape[-1]).cpu(), samples, replacement=True, generator=generator).T
            one_hot = F.one_hot(drawn.to(f.device), p.shape[-1]).to(f.dtype).view(samples, *p.shape)
            g = (p - one_hot).movedim(-1, 2)
        elif kind == "bce":
            uniform = torch.rand(samples, *f.shape, generator=generator, dtype=f.dtype).to(f.device)
            g = f.sigmoid() - (uniform < f.sigmoid()).to(f.dtype)
        else:
            g = 2**0.5 * torch.randn(samples, *f.shape, generator=generator, dtype=f.dtype).to(f.device)
        return g.div(float(samples * per_example) ** 0.5)


class EmpiricalFisherOperator(_OutputOperator):
    """The empirical Fisher `(1/N) Σ g_n g_nᵀ`, g_n the gradient of example n's mean-reduced loss at its own target.

    Args:
        centered: subtract `ḡ ḡᵀ`, ḡ the mean gradient: the covariance of the gradients.
    The others are those of `GGNOperator`; the batch's loss must be the mean of its examples' losses.

    Source: Kunstner, Balles, Hennig 2019, "Limitations of the Empirical Fisher Approximation".
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Data,
        *,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, loss_fn, data, **options)
        self._mean = self._gradient() if centered else None

    def _middle(self, outputs: Tensor, targets: Any, index: int) -> Action:
        leaf = outputs.detach().requires_grad_()
        (grad,) = torch.autograd.grad(mean_loss(self.loss_fn, leaf, targets), [leaf], materialize_grads=True)
        return rank_one(grad[None] * len(grad))

    def _products(self, rows: Tensor) -> Tensor:
        total = super()._products(rows)
        if self._mean is not None:
            total -= (rows @ self._mean)[:, None] * self._mean
        return total
