"""How far a latent weight is from its binary form, in closed form and measured, and what a binary network costs.

Legend: b = E|w| of Laplace-distributed weights, w0 the frequency of BiPer, m1 and m2 the first and second absolute moments of the latent.
The best scaled signs of a latent v are m1 sign(v); their mean squared error is m2 - m1^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from phyla.quantized import functional
from phyla.quantized.binarizers import BiPer, IRNet, ReCU
from phyla.quantized.layers import BinaryConv1d, BinaryConv2d, BinaryLinear
from phyla.shared import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LayerReport",
    "LayerSummary",
    "ModelSummary",
    "QuantizationError",
    "analyze",
    "biper_quantization_error",
    "laplace_scale",
    "quantization_error",
    "recu_quantization_error",
    "summarize",
]

_BINARY = (BinaryLinear, BinaryConv1d, BinaryConv2d)


@dataclass(frozen=True)
class QuantizationError:
    """Mean squared error of the best scaled signs of a latent v.

    Attributes:
        error: m2 - m1^2 = min over g of E (|v| - g)^2.
        scale: the minimiser, m1 = E|v|.
        second_moment: m2 = E v^2.
    """

    error: float
    scale: float
    second_moment: float


def laplace_scale(w: Tensor) -> float:
    """Maximum-likelihood scale b of a Laplace distribution around 0: the mean of |w|.

    Raises: TypeError if w is no floating tensor, ValueError if it is empty or not finite.
    """
    return float(_values("w", w).abs().mean())


def _values(name: str, tensor: Tensor) -> Tensor:
    """The tensor in float64, detached."""
    checks.finite(name, checks.floating(name, tensor))
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected at least one value, got shape {tuple(tensor.shape)}")
    return tensor.detach().double()


def biper_quantization_error(b: float, frequency: float) -> QuantizationError:
    """Of sin(w0 w) for Laplace weights w, with x = b w0: m1 = x / (1 + x^2) coth(pi / (2 x)), m2 = 2 x^2 / (1 + 4 x^2).

    The error rises from 0 as x^2, is largest at x = 0.954882 (0.102835), and tends to 1/2 - 4 / pi^2 = 0.094715.

    Args:
        b: scale of the weights, E|w|.
        frequency: w0, in radians per unit of weight.

    Raises: TypeError, ValueError if one is not a positive number.
    Source: *BiPer*, section 3.4.
    """
    b, frequency = checks.in_range("b", b, 0.0, low_open=True), checks.in_range("frequency", frequency, 0.0, low_open=True)
    x = b * frequency
    if not 0.0 < x < math.inf:
        raise ValueError(f"frequency: expected b * frequency within the range of float64, got b={b}, frequency={frequency}")
    z = math.pi / (2 * x)
    coth = 1 + 2 / math.expm1(2 * z) if z < 20 else 1.0
    # x / (1 + x^2) and its like by 1 / x where x is large: neither square overflows.
    m1 = (x / (1 + x * x) if x < 1 else (1 / x) / (1 + (1 / x) ** 2)) * coth
    m2 = 2 * x * x / (1 + 4 * x * x) if x < 1 else 2 / (4 + (1 / x) ** 2)
    return QuantizationError(m2 - m1 * m1, m1, m2)


def recu_quantization_error(b: float, tau: float) -> QuantizationError:
    """Of Laplace weights clamped to [-Q, Q], Q = -b ln e with e = 2 - 2 tau: m1 = b (1 - e), m2 = 2 b^2 - 2 b (Q + b) e.

    Args:
        b: scale of the weights, E|w|.
        tau: the quantile at which ReCU clamps, in [0.5, 1).

    Raises: TypeError, ValueError if b is not positive or tau outside its range.
    Source: *ReCU*, section 3.4.
    """
    b = checks.in_range("b", b, 0.0, low_open=True)
    e = 2 - 2 * checks.in_range("tau", tau, 0.5, 1.0, high_open=True)
    m1 = b * (1 - e)
    m2 = 2 * b * b * (1 - e + e * math.log(e))
    return QuantizationError(m2 - m1 * m1, m1, m2)


def quantization_error(latent: Tensor) -> QuantizationError:
    """Of the values of a tensor: m1 and m2 are means over all of them, the error is `mean (v - m1 sign(v))^2`.

    Raises: TypeError if latent is no floating tensor, ValueError if it is empty or not finite.
    """
    size = _values("latent", latent).abs()
    m1, m2 = float(size.mean()), float(size.square().mean())
    return QuantizationError(float((size - m1).square().mean()), m1, m2)


@dataclass(frozen=True)
class LayerReport:
    """What the weights of one binary layer look like.

    Attributes:
        name: of the layer in the model.
        binarizer: class of its weight binarizer.
        laplace_scale: b of the weights themselves.
        error: of the latent, which is sin(w0 W) for BiPer, the clamped W2 for ReCU, the standardised weight for IRNet, else W.
        sign_mean: mean of the signs; 0 where both are equally frequent.
        zero_gradient_fraction: share of the weights that no gradient reaches: dead until the latent moves for another reason.
    """

    name: str
    binarizer: str
    laplace_scale: float
    error: QuantizationError
    sign_mean: float
    zero_gradient_fraction: float


def analyze(model: nn.Module) -> tuple[LayerReport, ...]:
    """One report for each binary layer of the model, in the order of its modules.

    Raises: ValueError if weights are not finite.
    """
    return tuple(_report(name, module) for name, module in model.named_modules() if isinstance(module, _BINARY))


def _report(name: str, layer: BinaryLinear | BinaryConv1d | BinaryConv2d) -> LayerReport:
    weight, binarizer = layer.weight.detach(), layer.weight_binarizer
    latent, dead = weight, None
    if isinstance(binarizer, BiPer):
        latent = torch.sin(binarizer.frequency * weight)
    elif isinstance(binarizer, ReCU):
        latent = functional.recu_latent(weight, tau=binarizer.tau)
        dead = latent.abs() >= latent.abs().max()  # the clamp's derivative is 0 where it bites
    elif isinstance(binarizer, IRNet):
        latent = functional.irnet_latent(weight)
        dead = _surrogate(lambda v: functional.ede_sign(v, t=binarizer.t, k=binarizer.k), latent) == 0
    if dead is None:
        dead = _surrogate(binarizer, weight) == 0
    signs = torch.where(latent < 0, -1.0, 1.0)
    return LayerReport(
        name,
        type(binarizer).__name__,
        laplace_scale(weight),
        quantization_error(latent),
        float(signs.mean(dtype=torch.float64)),
        float(dead.double().mean()),
    )


def _surrogate(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """The derivative that an elementwise binarizer passes on."""
    leaf = value.clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@dataclass(frozen=True)
class LayerSummary:
    """The cost of one layer.

    Attributes:
        name: of the layer in the model.
        kind: its class.
        output_shape: of its last call.
        binary_parameters: weights that are stored in one bit.
        float_parameters: all others.
        binary_macs: multiply-adds of two signs, for the given input.
        float_macs: all other multiply-adds of linear layers and convolutions.
        bytes_float: of the parameters in float32.
        bytes_packed: of the parameters with binary weights in words of 64 bits, each output's row filled up to a whole word.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    binary_parameters: int
    float_parameters: int
    binary_macs: int
    float_macs: int
    bytes_float: int
    bytes_packed: int


@dataclass(frozen=True)
class ModelSummary:
    """The cost of a model; `str()` prints it as a table. The attributes are the rows and their sums, as in `LayerSummary`."""

    rows: tuple[LayerSummary, ...]
    binary_parameters: int
    float_parameters: int
    binary_macs: int
    float_macs: int
    bytes_float: int
    bytes_packed: int

    def __str__(self) -> str:
        table = [["layer", "kind", "output", *(column.replace("_", " ") for column in _COSTS)]]
        for row in self.rows:
            shape = " x ".join(str(size) for size in row.output_shape)
            table.append([row.name, row.kind, shape, *(f"{getattr(row, column):,}" for column in _COSTS)])
        table.append(["total", "", "", *(f"{getattr(self, column):,}" for column in _COSTS)])
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(f"{cell:{'<' if i < 3 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in table]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the bytes of each layer as float32 and packed, on a logarithmic scale.

        Args:
            ax: where to draw; None makes new axes.

        Raises: ImportError without matplotlib (`pip install 'phyla-quantized[plot]'`).
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("plot needs matplotlib: pip install 'phyla-quantized[plot]'") from error
            ax = pyplot.subplots()[1]
        places = range(len(self.rows))
        ax.barh([place - 0.2 for place in places], [row.bytes_float for row in self.rows], height=0.4, label="float32")
        ax.barh([place + 0.2 for place in places], [row.bytes_packed for row in self.rows], height=0.4, label="packed")
        ax.set_yticks(places, [row.name for row in self.rows])
        ax.set_xscale("log")
        ax.set_xlabel("bytes")
        ax.invert_yaxis()
        ax.legend()
        return ax


_COSTS = ("binary_parameters", "float_parameters", "binary_macs", "float_macs", "bytes_float", "bytes_packed")


def summarize(model: nn.Module, input_shape: tuple[int, ...]) -> ModelSummary:
    """Parameters, multiply-adds and bytes of every layer that has parameters, from one run on zeros.

    Args:
        model: a model that is not packed; it runs in eval mode and is left as it was.
        input_shape: of the input with its batch, such as `(1, 3, 32, 32)`; the multiply-adds are those of this whole input.

    Raises: TypeError, ValueError naming the size, or what the model raises on an input of another shape than it expects.
    """
    shape = tuple(checks.positive_int("input_shape", size) for size in input_shape)
    layers = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    outputs: dict[str, tuple[tuple[int, ...], int]] = {}

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = (tuple(output.shape), outputs.get(name, ((), 0))[1] + _macs(module, output))

        return module.register_forward_hook(hook)

    first = next(model.parameters(), torch.empty(0))
    training = {module: module.training for module in model.modules()}
    handles = [watch(name, module) for name, module in layers.items()]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(shape, dtype=first.dtype, device=first.device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    rows = tuple(_row(name, module, *outputs.get(name, ((), 0))) for name, module in layers.items())
    return ModelSummary(rows, *(sum(getattr(row, column) for row in rows) for column in _COSTS))


def _macs(module: nn.Module, output: Tensor) -> int:
    """Multiply-adds of one call: one for each output and each weight that leads to it."""
    if not isinstance(module, (*_BINARY, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 0
    return output.numel() * module.weight[0].numel()


def _row(name: str, module: nn.Module, output_shape: tuple[int, ...], macs: int) -> LayerSummary:
    total = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    binary = words = 0
    one_bit_inputs = False
    if isinstance(module, _BINARY):
        binary = module.weight.numel()
        words = module.weight.shape[0] * math.ceil(module.weight[0].numel() / 64)
        one_bit_inputs = not isinstance(module.input_binarizer, nn.Identity)
    floats = total - binary
    return LayerSummary(
        name,
        type(module).__name__,
        output_shape,
        binary,
        floats,
        macs if one_bit_inputs else 0,
        0 if one_bit_inputs else macs,
        4 * total,
        4 * floats + 8 * words,
    )
