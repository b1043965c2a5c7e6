"""The M-FAC optimizer: each gradient is multiplied by the inverse empirical Fisher matrix of the last gradients."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from phyla.second_order.inverse_fisher_window import InverseFisherWindow
from phyla.shared import checks

__all__ = ["MFAC"]


class _Slice(NamedTuple):
    """A parameter's place in the flat vectors, and where its weights take part (None: everywhere)."""

    parameter: Tensor
    group: dict[str, Any]
    start: int
    stop: int
    mask: Tensor | None


class MFAC(torch.optim.Optimizer):
    """`g = ∇ + weight_decay w`, `u = F⁻¹ g` with g in the window, `v = momentum v + (1 - momentum) u`, `w -= lr v`.

    F = damping I + GᵀG/num_grads spans all parameter groups; `lr`, `momentum` and `weight_decay` may differ by group and change any time.
    `state_dict()` holds the window, so that training resumes exactly. A step that fails before the parameters move may have stored its
    gradient; window, momentum and parameters stay usable.

    Args:
        params: parameters or groups; their flattening order is that of the vectors of the window.
        lr: learning rate.
        num_grads: gradients in the window; it takes `num_grads` times the parameters' memory.
        damping: the multiple of the identity in F.
        momentum: of the preconditioned gradients, in [0, 1).
        weight_decay: added to the gradient before it enters the window; or, if `decoupled_weight_decay`, w shrinks by 1 - lr weight_decay.
        decoupled_weight_decay: see `weight_decay`.
        normalization: "capacity" divides GᵀG by `num_grads` also while the window fills (the paper's way; the first steps are large),
            "count" by the number of gradients seen.
        sparse: weights that are zero now stay zero, and take no memory in the window.
        window_dtype: of the stored gradients; None for that of the parameters, float32 at least.
        window_device: None for the first parameter's.
        maximize: ascend.
        process_group: the window is divided over its ranks; gradients must be equal on them, as DistributedDataParallel leaves them.

    Raises: TypeError, ValueError: naming the argument; RuntimeError: see `InverseFisherWindow`.
    Source: M-FAC, section 3.3; the authors train with lr 1e-3, num_grads 512 or 1024.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        num_grads: int = 1024,
        damping: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        normalization: Literal["capacity", "count"] = "capacity",
        sparse: bool = False,
        window_dtype: torch.dtype | None = None,
        window_device: torch.device | str | None = None,
        maximize: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._slices: list[_Slice] = []
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize})
        self._options: dict[str, Any] = {"num_grads": num_grads, "damping": damping, "normalization": normalization}
        self._options |= {"dtype": window_dtype, "device": window_device, "process_group": process_group}
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._allocate([parameter.detach() != 0 if sparse else None for parameter in parameters])

    def _allocate(self, masks: Sequence[Tensor | None]) -> None:
        """Lay the parameters out in the flat vectors, and make the window and the buffer that gradients are gathered in."""
        self._slices = self._lay_out(masks)
        dim, options = self._slices[-1].stop, dict(self._options)
        if dim == 0:
            raise ValueError("params: expected a weight that is not zero, with sparse=True, got none")
        widest = functools.reduce(torch.promote_types, (part.parameter.dtype for part in self._slices), torch.float32)
        options["dtype"] = options["dtype"] or widest
        options["device"] = options["device"] or self._slices[0].parameter.device
        self.window = InverseFisherWindow(dim, options.pop("num_grads"), **options)
        self._gradient = torch.empty(dim, dtype=torch.promote_types(options["dtype"], torch.float32), device=options["device"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Used by the constructor. Raises: ValueError: later on, since the window spans the parameters that it was made for."""
        if self._slices:
            raise ValueError("param_group: expected all groups at construction, since the window spans them, got one more")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        checks.in_range("lr", group["lr"], 0, math.inf, high_open=True)
        checks.in_range("momentum", group["momentum"], 0, 1, high_open=True)
        checks.in_range("weight_decay", group["weight_decay"], 0, math.inf, high_open=True)
        for parameter in group["params"]:
            checks.floating("params", parameter)

    def _lay_out(self, masks: Sequence[Tensor | None]) -> list[_Slice]:
        pairs = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        sizes = [p.numel() if mask is None else int(mask.sum()) for (_, p), mask in zip(pairs, masks, strict=True)]
        stops = list(itertools.accumulate(sizes))
        return [
            _Slice(parameter, group, stop - size, stop, mask)
            for (group, parameter), mask, size, stop in zip(pairs, masks, sizes, stops, strict=True)
        ]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update.

        Args:
            closure: evaluates the model anew, calls backward and returns the loss.

        Returns: what `closure` returns.
        Raises: ValueError: a parameter without gradient, or gradients that are not finite; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for part in self._slices:
            self._gather(part)
        update = self.window.push_ihvp(self._gradient)
        for part in self._slices:
            self._move(part, update[part.start : part.stop])
        return loss

    def _check_gradients(self) -> None:
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{i} of group {index}" for i in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.grad is None:
                    raise ValueError(
                        f"params: expected a gradient for every parameter, got none for parameter {name} of shape {tuple(parameter.shape)} "
                        "(leave parameters with requires_grad=False, and those that the loss does not use, out of the optimizer)"
                    )
                if parameter.grad.layout != torch.strided:
                    raise TypeError(f"params: expected dense gradients, got {parameter.grad.layout} for parameter {name}")

    def _gather(self, part: _Slice) -> None:
        """Write ∇ + weight_decay w into the parameter's place of the flat gradient."""
        group, parameter, gradient = part.group, part.parameter, part.parameter.grad
        assert gradient is not None
        place = self._gradient[part.start : part.stop]
        if part.mask is None:
            place = place.view(parameter.shape)
        place.copy_(gradient if part.mask is None else gradient[part.mask])
        if group["maximize"]:
            place.neg_()
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            weights = parameter if part.mask is None else parameter[part.mask]
            place.add_(weights.to(place), alpha=group["weight_decay"])

    def _move(self, part: _Slice, update: Tensor) -> None:
        """Momentum and the step of one parameter from its part of F⁻¹ g."""
        group, parameter = part.group, part.parameter
        update = update.to(parameter.device, parameter.dtype)
        update = update.view(parameter.shape) if part.mask is None else torch.zeros_like(parameter).masked_scatter_(part.mask, update)
        if group["momentum"]:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            update = state["momentum_buffer"].lerp_(update, 1 - group["momentum"])
        if group["decoupled_weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Torch's entries, and a snapshot of the window and of the masks of `sparse`."""
        return {**super().state_dict(), "window": self.window.state_dict(), "masks": [part.mask for part in self._slices]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume. Raises: ValueError: no state of an MFAC with these parameters and this window."""
        masks = state_dict.get("masks")
        if "window" not in state_dict or masks is None or len(masks) != len(self._slices):
            raise ValueError("state_dict: expected one of MFAC with as many parameters (entries 'window' and 'masks'), got another")
        for part, mask in zip(self._slices, masks, strict=True):
            if (part.mask is None) != (mask is None) or (mask is not None and mask.shape != part.parameter.shape):
                raise ValueError("state_dict: expected one of MFAC with the same `sparse` and shapes, got other masks")
        super().load_state_dict({"state": state_dict["state"], "param_groups": state_dict["param_groups"]})
        masks = [None if mask is None else mask.to(part.parameter.device) for mask, part in zip(masks, self._slices, strict=True)]
        self._slices = self._lay_out(masks)  # the groups are new objects
        if self._slices[-1].stop != self.window.dim:
            self._allocate(masks)
        self.window.load_state_dict(state_dict["window"])

    def __getstate__(self) -> dict[str, Any]:
        names = ("_slices", "_options", "window", "_gradient")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}
