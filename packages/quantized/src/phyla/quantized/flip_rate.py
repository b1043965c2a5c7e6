"""How many binary weights change their sign from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phyla.quantized import functional as QF
from phyla.quantized.layers import BinaryLayer


@dataclass(frozen=True)
class FlipRates:
    """Fractions of flipped signs.

    Attributes:
        layers: names of the binary layers, in the order of the model.
        rates: `(steps, layers)` float64, the fraction of a layer's weights whose sign differs from that of the step before.
    """

    layers: tuple[str, ...]
    rates: Tensor

    def mean(self) -> dict[str, float]:
        """The mean rate of each layer over all steps; NaN before the first one."""
        return dict(zip(self.layers, self.rates.mean(0).tolist(), strict=True))


class FlipRecorder:
    """Compares the signs of all binary weights with those of the step before; made by `flip_rate`."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, BinaryLayer)}
        if not self._layers:
            raise ValueError(f"model: expected a model with binary layers, got a {type(model).__name__} without one")
        self._signs, self._steps = self._read(), [torch.empty(0, len(self._layers), dtype=torch.float64)]

    def _read(self) -> list[Tensor]:
        with torch.no_grad():
            return [QF.pack(m.weight_binarizer(m.weight).reshape(1, -1)) for m in self._layers.values()]

    def step(self) -> None:
        """Record one step: call it after the optimizer's."""
        before, self._signs = self._signs, self._read()
        lengths = [m.weight.numel() for m in self._layers.values()]
        products = [QF.packed_matmul(a, b, n) for a, b, n in zip(before, self._signs, lengths, strict=True)]
        row = [(n - int(product)) / (2 * n) for n, product in zip(lengths, products, strict=True)]
        self._steps.append(torch.tensor([row], dtype=torch.float64))

    @property
    def rates(self) -> FlipRates:
        """What was recorded until now."""
        return FlipRates(tuple(self._layers), torch.cat(self._steps))


@contextmanager
def flip_rate(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[FlipRecorder]:
    """Record the fraction of binary weights that change their sign in each step and layer.

        with flip_rate(model, optimizer) as flips:
            train(model, optimizer)
        print(flips.rates.mean())

    The signs are those of the binarized weight, packed, so that a step costs one bit a weight.

    Args:
        model: A model with binary layers.
        optimizer: Each of its steps is recorded while the context is open; if None, call `step()` on what the context gives.

    Raises:
        ValueError: If the model has no binary layer.

    Source: Larq's metric of the same name; "Latent Weights Do Not Exist: Rethinking Binarized Neural Network Optimization", section 4.2.
    """
    recorder = FlipRecorder(model)
    hook = None if optimizer is None else optimizer.register_step_post_hook(lambda *_: recorder.step())
    try:
        yield recorder
    finally:
        if hook is not None:
            hook.remove()
