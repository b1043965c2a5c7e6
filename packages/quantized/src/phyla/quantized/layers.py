"""Binary layers: binarized inputs meet binarized weights, and each output channel has one real factor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyla.quantized import functional as QF
from phyla.quantized.binarizers import ApproxSign, Binarizer, SignSTE
from phyla.quantized.checkpointing import saving_bits
from phyla.shared import checks

Scale = Literal["learned", "mean_abs", "none"]
PaddingValue = Literal[0, 1, -1]


class BinaryLayer(nn.Module):
    """What binary layers share: y = op(B_in(n(x)), B_w(W)) * (s_w(W) alpha) + bias. Use `BinaryLinear`, `BinaryConv1d` or `BinaryConv2d`.

    `weight_binarizer` supplies B_w and s_w; `input_binarizer` B_in; n divides each sample by its standard deviation while training.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: nn.Parameter | None
    _sample_dims: int  # dimensions of one input without its batch

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        weight_binarizer: Binarizer | None,
        input_binarizer: nn.Module | None,
        scale: Scale,
        normalize_input: bool,
        save_bits: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.scale_mode = checks.choice("scale", scale, ("learned", "mean_abs", "none"))
        self.weight_binarizer = SignSTE() if weight_binarizer is None else weight_binarizer
        self.input_binarizer = ApproxSign() if input_binarizer is None else input_binarizer
        if not isinstance(self.weight_binarizer, Binarizer):
            raise TypeError(f"weight_binarizer: expected a Binarizer, got {type(weight_binarizer).__name__}")
        if not isinstance(self.input_binarizer, Binarizer | nn.Identity):
            raise TypeError(f"input_binarizer: expected a Binarizer or nn.Identity, got {type(input_binarizer).__name__}")
        self.normalize_input, self.save_bits = bool(normalize_input), bool(save_bits)
        if self.save_bits and not isinstance(self.input_binarizer, Binarizer):
            raise ValueError("save_bits: expected False where input_binarizer is nn.Identity, whose values are real, got True")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(weight_shape, **factory))
        self.bias = nn.Parameter(torch.empty(weight_shape[0], **factory)) if bias else None
        self.scale = nn.Parameter(torch.empty(weight_shape[0], **factory)) if scale == "learned" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of Kaiming's normal distribution (fan in), factors uniform in [0, 1), bias as in torch's layers."""
        nn.init.kaiming_normal_(self.weight)
        if self.scale is not None:
            nn.init.uniform_(self.scale)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def output_scale(self) -> Tensor | None:
        """The product of all factors of an output channel, `(out,)`; None where there is none."""
        own = self.weight.detach().abs().flatten(1).mean(1) if self.scale_mode == "mean_abs" else self.scale
        binarizer = self.weight_binarizer.scale(self.weight)
        if binarizer is None or own is None:
            return own if binarizer is None else binarizer
        return binarizer * own

    def binary_input(self, x: Tensor) -> Tensor:
        """B_in(n(x)), with the shape of `x`."""
        if not (self.normalize_input and self.training):
            out: Tensor = self.input_binarizer(x)
            return out
        batched = x.dim() > self._sample_dims
        if isinstance(self.input_binarizer, Binarizer):
            return self.input_binarizer.normalized(x, batched=batched)
        return QF.normalize_samples(x, batched=batched)

    def _operate(self, operation: Callable[[Tensor, Tensor], Tensor], binary: Tensor, channel: int) -> Tensor:
        """The operation on binary input and weight, then the factors and the bias on dimension `channel` (negative) of its output."""
        weight = self.weight_binarizer(self.weight)
        if self.save_bits and not self.input_binarizer.is_binary:
            raise ValueError(f"save_bits: expected an input_binarizer that gives -1 and +1, got {self.input_binarizer}")
        y = saving_bits(operation, binary, weight) if self.save_bits else operation(binary, weight)
        trailing = (1,) * (-1 - channel)
        for apply, vector in ((torch.mul, self.output_scale()), (torch.add, self.bias)):
            y = y if vector is None else apply(y, vector.to(y.dtype).view(-1, *trailing))
        return y

    def _options(self) -> str:
        return f"bias={self.bias is not None}, scale={self.scale_mode}, normalize_input={self.normalize_input}, save_bits={self.save_bits}"


class BinaryLinear(BinaryLayer):
    """Linear layer of binary inputs and binary weights.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether a real bias is added.
        weight_binarizer: Binarizes the weights; `SignSTE()` if None.
        input_binarizer: Binarizes the inputs; `ApproxSign()` if None, `nn.Identity()` keeps them real.
        scale: Factor of an output: "learned" is a parameter, "mean_abs" the mean absolute weight (without a gradient), "none" is 1.
        normalize_input: Whether each sample is divided by its standard deviation while training, which moves the surrogate's window only.
        save_bits: Whether the binary input is kept for the backward pass as bits, at 1/32 of the memory of float32; same gradients. Under
            `torch.compile` the compiler decides what is kept.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape: `(..., in_features)` to `(..., out_features)`.

    Raises:
        TypeError, ValueError: If an argument is none of the above.

    Source: BiPer, section 3, and ReCU, section 3 (the layer); "XNOR-Net", section 3.1 ("mean_abs").
    """

    _sample_dims = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        weight_binarizer: Binarizer | None = None,
        input_binarizer: nn.Module | None = None,
        scale: Scale = "learned",
        normalize_input: bool = False,
        save_bits: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self_in, self_out = checks.positive_int("in_features", in_features), checks.positive_int("out_features", out_features)
        super().__init__(
            (self_out, self_in), bias, weight_binarizer, input_binarizer, scale, normalize_input, save_bits, device=device, dtype=dtype
        )
        self.in_features, self.out_features = self_in, self_out

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        checks.last_dim("x", x, self.in_features)
        return self._operate(F.linear, self.binary_input(x), -1)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._options()}"


def _sizes(name: str, value: int | tuple[int, ...], count: int, least: int) -> tuple[int, ...]:
    """`count` whole numbers of at least `least`; one stands for all."""
    sizes = (value,) * count if isinstance(value, int) else tuple(value)
    if len(sizes) != count or any(isinstance(s, bool) or not isinstance(s, int) or s < least for s in sizes):
        raise ValueError(f"{name}: expected an int of at least {least} or {count} of them, got {value!r}")
    return sizes


class _BinaryConv(BinaryLayer):
    """Convolution of binary inputs and binary weights in `_sample_dims - 1` spatial dimensions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        padding_value: PaddingValue = 0,
        weight_binarizer: Binarizer | None = None,
        input_binarizer: nn.Module | None = None,
        scale: Scale = "learned",
        normalize_input: bool = False,
        save_bits: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            checks.positive_int(name, count)
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups: expected a divisor of in_channels={in_channels} and out_channels={out_channels}, got {groups}")
        if isinstance(padding_value, bool) or padding_value not in (0, 1, -1):
            raise ValueError(f"padding_value: expected 0, 1 or -1, got {padding_value!r}")
        spatial = self._sample_dims - 1
        kernel = _sizes("kernel_size", kernel_size, spatial, 1)
        shape = (out_channels, in_channels // groups, *kernel)
        super().__init__(shape, bias, weight_binarizer, input_binarizer, scale, normalize_input, save_bits, device=device, dtype=dtype)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.padding_value = kernel, padding_value
        self.stride, self.padding = _sizes("stride", stride, spatial, 1), _sizes("padding", padding, spatial, 0)
        self.dilation = _sizes("dilation", dilation, spatial, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `([batch,] in_channels, ...)` to `([batch,] out_channels, ...)`."""
        spatial = self._sample_dims - 1
        if x.dim() not in (spatial + 1, spatial + 2) or x.shape[-spatial - 1] != self.in_channels:
            wanted = ", ".join(("batch", str(self.in_channels), *("length",) * spatial))
            raise ValueError(f"x: expected shape ({wanted}), with or without the batch, got {tuple(x.shape)}")
        binary, padding = self.binary_input(x), self.padding
        if self.padding_value and any(padding):
            binary = F.pad(binary, [p for size in reversed(padding) for p in (size, size)], value=float(self.padding_value))
            padding = (0,) * spatial
        convolution: Callable[..., Tensor] = (F.conv1d, F.conv2d)[spatial - 1]

        def operation(a: Tensor, w: Tensor) -> Tensor:
            return convolution(a, w, None, self.stride, padding, self.dilation, self.groups)

        return self._operate(operation, binary, -spatial - 1)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, padding_value={self.padding_value}, {self._options()}"
        )


class BinaryConv1d(_BinaryConv):
    """Convolution of binary sequences with binary kernels.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Length of the kernel.
        stride: Step of the kernel.
        padding: Positions added at both ends of the binary input.
        dilation: Step between the taps of the kernel.
        groups: Blocks of channels that are convolved apart; divides both numbers of channels.
        bias: Whether a real bias is added.
        padding_value: Value of the added positions: 0 as published (a third value at the border), or a binary one.
        weight_binarizer: As in `BinaryLinear`, like `input_binarizer`, `scale`, `normalize_input`, `save_bits`, `device` and `dtype`.

    Shape: `(batch, in_channels, length)` to `(batch, out_channels, length')`; the batch may be missing.

    Raises:
        TypeError, ValueError: If an argument is none of the above.

    Source: BiPer, section 3, and ReCU, section 3; Larq, "one padding" (`padding_value=1`).
    """

    _sample_dims = 2


class BinaryConv2d(_BinaryConv):
    """Convolution of binary images with binary kernels.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel; one number stands for both, also below.
        stride: Steps of the kernel.
        padding: Rows and columns added on each side of the binary input.
        dilation: Steps between the taps of the kernel.
        groups: Blocks of channels that are convolved apart; divides both numbers of channels.
        bias: Whether a real bias is added.
        padding_value: Value of the added pixels: 0 as published (a third value at the border), or a binary one.
        weight_binarizer: As in `BinaryLinear`, like `input_binarizer`, `scale`, `normalize_input`, `save_bits`, `device` and `dtype`.

    Shape: `(batch, in_channels, height, width)` to `(batch, out_channels, height', width')`; the batch may be missing.

    Raises:
        TypeError, ValueError: If an argument is none of the above.

    Source: BiPer, section 3, and ReCU, section 3; Larq, "one padding" (`padding_value=1`).
    """

    _sample_dims = 3
