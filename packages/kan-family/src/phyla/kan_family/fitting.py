"""Fitting a model to data with the recipe of the KAN papers: L-BFGS, grid updates, the sparsity penalty."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from phyla.kan_family.bases import BSpline
from phyla.kan_family.plots import axes
from phyla.shared import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """The course of a fit; every entry is taken after its step, in evaluation mode.

    Attributes:
        train_loss: `(steps,)`, loss on the data of the step; fewer entries if the fit was stopped by a non-finite loss.
        test_loss: `(steps,)`, loss on the test data, or None if none were given.
        regularization: `(steps,)`, the penalty before it is weighted; zeros if its weight is 0.
    """

    train_loss: Tensor
    test_loss: Tensor | None
    regularization: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Losses over the steps on a logarithmic scale, into `ax` or new axes; needs matplotlib (extra `plot`)."""
        ax = axes(ax)
        ax.semilogy(self.train_loss.numpy(force=True), label="train")
        if self.test_loss is not None:
            ax.semilogy(self.test_loss.numpy(force=True), label="test")
        ax.set(xlabel="step", ylabel="loss")
        ax.legend()
        return ax


def _samples(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dim() == 0 or len(value) == 0:
        raise ValueError(f"{name}: expected shape (samples, ...) with at least one sample, got shape {tuple(value.shape)}")
    return value


def _pair(x_name: str, x: object, y_name: str, y: object) -> tuple[Tensor, Tensor]:
    inputs, targets = _samples(x_name, x), _samples(y_name, y)
    if len(inputs) != len(targets):
        raise ValueError(f"{y_name}: expected {len(inputs)} samples like {x_name}, got shape {tuple(targets.shape)}")
    return inputs, targets


def _grid_update(model: nn.Module) -> Callable[[Tensor], object] | None:
    """The model's grid update, if it has one and B-splines for which it means something."""
    splines = any(isinstance(getattr(module, "spec", None), BSpline) for module in model.modules())
    return getattr(model, "update_grid", None) if splines else None


def _state(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


def _mean_squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    if prediction.shape != y.shape:
        raise ValueError(f"y: expected shape {tuple(prediction.shape)} like the model's output, got shape {tuple(y.shape)}")
    return nn.functional.mse_loss(prediction, y)


def _batches(x: Tensor, y: Tensor, size: int | None, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of one size: epochs in random order, the incomplete last batch of each left out."""
    if size is None or size >= len(x):
        while True:
            yield x, y
    while True:
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(len(x), generator=generator, device=device).to(x.device)
        for start in range(0, len(x) - size + 1, size):
            rows = order[start : start + size]
            yield x[rows], y[rows]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _optimizer(name: str, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr)
    return torch.optim.LBFGS(
        parameters, lr=lr, max_iter=20, history_size=10, tolerance_grad=1e-32, tolerance_change=1e-32, line_search_fn="strong_wolfe"
    )


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 100,
    optimizer: Literal["lbfgs", "adam"] = "lbfgs",
    lr: float | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    regularization: float = 0.0,
    grid_update_every: int = 5,
    grid_update_until: int = 50,
    batch_size: int | None = None,
    x_test: Tensor | None = None,
    y_test: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    callback: Callable[[int, float], object] | None = None,
) -> FitResult:
    """Train any module on `(x, y)`; B-spline KANs also adapt their grids to `x`.

    The grids are updated before the steps `0, grid_update_every, ..` below `grid_update_until`, if the model has an `update_grid`
    and contains B-splines; L-BFGS then starts with a new state. If the loss becomes non-finite, the fit stops, brings back the
    parameters and buffers from before that step and warns (`RuntimeWarning`). The model trains in the mode that it is in.

    Args:
        model: Trained in place.
        x: `(samples, ...)`.
        y: `(samples, ...)`.
        steps: Optimizer steps; one of L-BFGS has up to 20 inner iterations.
        optimizer: "lbfgs" (history 10, strong Wolfe) or "adam".
        lr: None means 1.0 for L-BFGS and 1e-2 for Adam.
        loss: `loss(model(x), y)`, a scalar; None is the mean squared error.
        regularization: Weight of `model.regularization(x)`, added to the loss.
        grid_update_every: Steps from one grid update to the next.
        grid_update_until: First step that has no grid update any more; 0 for none at all.
        batch_size: Samples of a step, drawn without replacement until all have been seen; None means all.
        x_test: Data for `test_loss`.
        y_test: Its targets.
        generator: Source of the batches' order.
        progress: Show a progress bar.
        callback: Called after every step with its number and its training loss.

    Returns:
        The losses after each step.

    Raises:
        ValueError: If an option is out of range, there are no samples or their numbers differ, the model has nothing to train, or
            a penalty is asked for that the model does not have.
        TypeError: If data are not Tensors, or only one of `x_test` and `y_test` is given.

    Source: "KAN: Kolmogorov-Arnold Networks", sections 2.4 and 2.5, and pykan's `fit`.
    """
    checks.positive_int("steps", steps)
    checks.choice("optimizer", optimizer, ("lbfgs", "adam"))
    rate = checks.in_range("lr", (1.0 if optimizer == "lbfgs" else 1e-2) if lr is None else lr, 0.0, low_open=True)
    checks.in_range("regularization", regularization, 0.0)
    checks.positive_int("grid_update_every", grid_update_every)
    checks.in_range("grid_update_until", grid_update_until, 0)
    if batch_size is not None:
        checks.positive_int("batch_size", batch_size)
    _pair("x", x, "y", y)
    test = None if x_test is None and y_test is None else _pair("x_test", x_test, "y_test", y_test)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model: expected at least one parameter that requires a gradient, got none")
    if regularization > 0 and not hasattr(model, "regularization"):
        raise ValueError(f"regularization: expected 0 for a model without a regularization(x) method, got {regularization}")

    update_grid = _grid_update(model)
    measure = loss or _mean_squared_error

    def penalty(inputs: Tensor) -> Tensor:
        value: Tensor = model.regularization(inputs) if regularization > 0 else inputs.new_zeros(())  # type: ignore[operator]
        return value

    saved = [tensor.clone() for tensor in _state(model)]
    solver = _optimizer(optimizer, parameters, rate)
    train_losses, test_losses, penalties = [], [], []
    batches = _batches(x, y, batch_size, generator)
    for step in (bar := tqdm(range(steps), disable=not progress, desc="fit")):
        batch_x, batch_y = next(batches)
        if update_grid is not None and step < grid_update_until and step % grid_update_every == 0:
            update_grid(x)
            if optimizer == "lbfgs":
                solver = _optimizer(optimizer, parameters, rate)

        def closure(batch_x: Tensor = batch_x, batch_y: Tensor = batch_y, solver: torch.optim.Optimizer = solver) -> float:
            solver.zero_grad()
            objective = measure(model(batch_x), batch_y) + regularization * penalty(batch_x)
            objective.backward()  # type: ignore[no-untyped-call]
            return float(objective.detach())

        solver.step(closure)
        with _evaluation(model):
            train_loss = float(measure(model(batch_x), batch_y))
            size = float(penalty(batch_x))
            test_loss = None if test is None else float(measure(model(test[0]), test[1]))
        if not math.isfinite(train_loss + size):
            torch._foreach_copy_(_state(model), saved)
            warnings.warn(
                f"fit: the loss became non-finite at step {step}; the parameters from before it are restored", RuntimeWarning, stacklevel=2
            )
            break
        torch._foreach_copy_(saved, _state(model))
        train_losses.append(train_loss)
        penalties.append(size)
        if test_loss is not None:
            test_losses.append(test_loss)
        bar.set_postfix(loss=f"{train_loss:.3e}")
        if callback is not None:
            callback(step, train_loss)
    solver.zero_grad()
    return FitResult(
        torch.tensor(train_losses, dtype=torch.float64),
        None if test is None else torch.tensor(test_losses, dtype=torch.float64),
        torch.tensor(penalties, dtype=torch.float64),
    )
