"""Binary layers with their weights in bits: sums by XOR and population count, and bits instead of floats between them.

A packed layer reads floats, which it signs and packs, or the int64 words of packed channels-last signs. It returns floats, or words where
a threshold was folded into it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.quantized import functional as QF
from phyla.quantized.binarizers import ApproxSign, Binarizer, EDESign, IRNet, SignSTE, SwishSign
from phyla.quantized.folding import FoldedThreshold
from phyla.quantized.functional.bits import check_words
from phyla.quantized.functional.epilogues import _conv2d_residual_op, _conv2d_threshold_op
from phyla.quantized.functional.packed_conv import Geometry, _conv2d_op
from phyla.quantized.layers import BinaryConv1d, BinaryConv2d, BinaryLayer, BinaryLinear
from phyla.shared import checks

__all__ = ["PackedConv1d", "PackedConv2d", "PackedLayer", "PackedLinear", "PackedMaxPool2d"]

_PLAIN_SIGNS = (SignSTE, ApproxSign, SwishSign, EDESign)


def plain_sign(binarizer: nn.Module) -> bool:
    """Whether a binarizer takes the sign of each value as it is."""
    return isinstance(binarizer, _PLAIN_SIGNS) and not isinstance(binarizer, IRNet)


def binary_input(layer: BinaryLayer) -> bool:
    """Whether a layer multiplies signs by signs."""
    return isinstance(layer.input_binarizer, Binarizer) and layer.input_binarizer.is_binary


class PackedLayer(nn.Module):
    """What packed layers share. Use `PackedLinear`, `PackedConv1d` or `PackedConv2d`, or `pack` for a whole model.

    Attributes:
        weight_packed: int64 words, one row an output.
        scale: factor of each output, (out,); ones where the layer has none.
        bias: (out,) or None.
        threshold: int32 (out,) where the layer returns bits, else None.
        flip: bool (out,), with `threshold`.
        input_binarizer: applied to float inputs ahead of the packing; None for a plain sign.
        real_input: the inputs stay real: the weights are unpacked at each call.
    """

    weight_packed: Tensor
    scale: Tensor
    bias: Tensor | None
    threshold: Tensor | None
    flip: Tensor | None
    _settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layer: BinaryLayer) -> None:
        super().__init__()
        if not layer.weight_binarizer.is_binary:
            raise ValueError(
                f"weight_binarizer: expected one that gives -1 and +1, got {layer.weight_binarizer}, whose weights are real: "
                "call set_stage(model, 2) and train or evaluate with binary weights first"
            )
        if layer.weight.dtype not in (torch.float32, torch.float64):
            kind = str(layer.weight.dtype).removeprefix("torch.")
            raise TypeError(f"weight: expected float32 or float64, got {kind}: call model.float() before packing")
        with torch.no_grad():
            signs = layer.weight_binarizer(layer.weight)
            scale = layer.output_scale()
        self.length = signs[0].numel()
        self.register_buffer("weight_packed", QF.pack(self._rows(signs)))
        self.register_buffer("scale", layer.weight.new_ones(len(signs)) if scale is None else scale.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.register_buffer("threshold", None)
        self.register_buffer("flip", None)
        binarizer = layer.input_binarizer
        self.real_input = not binary_input(layer)
        self.input_binarizer = None if plain_sign(binarizer) or isinstance(binarizer, nn.Identity) else binarizer

    def _rows(self, signs: Tensor) -> Tensor:
        """Weights as rows in the order in which the inputs are packed."""
        return signs.movedim(1, -1).flatten(1)

    def fold(self, folded: FoldedThreshold) -> None:
        """Return bits from now on: those of `(sum >= threshold) != flip`.

        Raises: ValueError if it has another number of channels, or the inputs are real.
        """
        if self.real_input:
            raise ValueError("input_binarizer: expected one that gives -1 and +1 where a threshold is folded, got real inputs")
        checks.shape("threshold", folded.threshold, (self.scale.shape[0],))
        self.threshold, self.flip = folded.threshold, folded.flip

    def _signed(self, x: Tensor) -> Tensor:
        """The input as the layer's binarizer leaves it; it is the packing that takes a plain sign."""
        return x if self.input_binarizer is None else self.input_binarizer(x)

    def _finish(self, sums: Tensor) -> Tensor:
        """Factor and bias, with the roundings of the binary layer; the channel is the last dimension."""
        y = sums.to(self.scale.dtype) * self.scale
        return y if self.bias is None else y + self.bias

    def settings(self) -> dict[str, Any]:
        """What the layer is but for its tensors, in values that JSON knows."""
        binarizer = "real" if self.real_input else "sign" if self.input_binarizer is None else type(self.input_binarizer).__name__
        return {
            "type": type(self).__name__,
            **{name: _jsonable(getattr(self, name)) for name in self._settings},
            "input": binarizer,
            "output": "float" if self.threshold is None else "bits",
        }

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return ", ".join(f"{name}={value}" for name, value in self.settings().items() if name != "type")


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class PackedLinear(PackedLayer):
    """A `BinaryLinear` with packed weights.

    Args:
        layer: is read, not changed.
        channels: the inputs are flattened images of so many channels, which arrive packed as `(N, H, W, ceil(channels/64))`; None for
            plain features.

    Shape:
        Floats `(..., in_features)` or words `(..., ceil(in_features/64))` to floats `(..., out_features)`, or to words
        `(..., ceil(out_features/64))` where a threshold is folded in.

    Raises: TypeError for weights that are not float32 or float64, ValueError for a weight binarizer that is not binary.
    """

    _settings = ("in_features", "out_features", "channels")

    def __init__(self, layer: BinaryLinear, *, channels: int | None = None) -> None:
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.channels = None if channels is None else checks.positive_int("channels", channels)
        if channels is not None and layer.in_features % channels:
            raise ValueError(f"channels: expected a divisor of in_features={layer.in_features}, got {channels}")
        super().__init__(layer)

    def _rows(self, signs: Tensor) -> Tensor:
        if self.channels is None:
            return signs
        return signs.reshape(*signs.shape[:-1], self.channels, -1).movedim(-2, -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Raises:
            TypeError: x is neither floating nor int64.
            ValueError: another shape of x; ahead of a folded batch normalisation, floats that are not `(N, in_features)`.
        """
        if x.dtype == torch.int64:
            words = x if self.channels is None or x.dim() == 2 else self._flat(x.flatten(1, -2))
        else:
            checks.last_dim("x", checks.floating("x", x), self.in_features)
            if self.real_input:
                signs = QF.unpack(self.weight_packed, self.in_features, dtype=self.scale.dtype)
                return self._finish(F.linear(self._signed(x), signs))
            words = QF.pack(self._rows(self._signed(x)))
        rows = words.reshape(-1, words.shape[-1])
        if self.threshold is None or self.flip is None:
            sums = QF.packed_matmul(rows, self.weight_packed, self.in_features)
            return self._finish(sums).reshape(*words.shape[:-1], self.out_features)
        if words.dim() != 2:
            raise ValueError(f"x: expected shape (N, {self.in_features}) ahead of a folded batch normalisation, got {tuple(x.shape)}")
        return QF.packed_matmul_threshold(rows, self.weight_packed, self.in_features, self.threshold, self.flip)

    def _flat(self, words: Tensor) -> Tensor:
        """The words of flattened images, from `(N, pixels, ceil(channels/64))`: the bits that fill up a pixel's last word go."""
        assert self.channels is not None
        return QF.pack(QF.unpack(words, self.channels).flatten(1)) if self.channels % 64 else words.flatten(1)


class _PackedConv(PackedLayer):
    """Convolution over images; sequences are images of one row."""

    _settings = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_value")
    _spatial: ClassVar[int]
    _row: ClassVar[dict[str, tuple[int, ...]]] = {}  # what a sequence's kernel, stride and so on are in the direction that it lacks

    def __init__(self, layer: BinaryConv1d | BinaryConv2d) -> None:
        super().__init__(layer)
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.padding, self.dilation = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        self.padding_value = layer.padding_value
        kernel, stride, padding, dilation = (
            [*self._row.get(name, ()), *getattr(self, name)] for name in ("kernel_size", "stride", "padding", "dilation")
        )
        self._geometry = Geometry(self.in_channels, kernel, stride, padding, dilation, self.groups, self.padding_value)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Raises:
            TypeError: x is neither floating nor int64.
            ValueError: another shape of x.
        """
        if x.dtype == torch.int64:
            return self._behind(self._products(check_words("x", x, self.in_channels, self._spatial + 2, of="channels")))
        wanted = (self._spatial + 1, self._spatial + 2) if self.threshold is None else (self._spatial + 2,)
        if checks.floating("x", x).dim() not in wanted or x.shape[-self._spatial - 1] != self.in_channels:
            shape = ", ".join(("batch", str(self.in_channels), *("length",) * self._spatial))
            missing = ", with or without the batch" if self.threshold is None else ""
            raise ValueError(f"x: expected shape ({shape}){missing}, got {tuple(x.shape)}")
        signed = self._signed(x)
        if self.real_input:
            return self._real(signed)
        batched = signed.dim() == self._spatial + 2
        y = self._behind(self._products(QF.pack((signed if batched else signed.unsqueeze(0)).movedim(1, -1))), like=x)
        return y if batched else y.squeeze(0)

    def _products(self, words: Tensor) -> Tensor:
        """Sums `(N, ..., O)` of words `(N, ..., W64)` of the right width, or the bits behind a threshold.

        No other size is checked: those of the layer are right since it was made.
        """
        x = words if self._spatial == 2 else words.unsqueeze(1)
        if self.threshold is None:
            out: Tensor = _conv2d_op.op(x, self.weight_packed, *self._geometry)
        else:
            out = _conv2d_threshold_op.op(x, self.weight_packed, self.threshold, self.flip, *self._geometry)
        return out if self._spatial == 2 else out.squeeze(1)

    def _behind(self, out: Tensor, like: Tensor | None = None) -> Tensor:
        """Bits as they are; sums with factor and bias, laid out as torch's convolution of `like` would."""
        if self.threshold is not None:
            return out
        y = self._finish(out).movedim(-1, 1)
        return y if like is not None and _channels_last(like) else y.contiguous()

    def _real(self, x: Tensor) -> Tensor:
        """The convolution of real inputs with unpacked signs."""
        signs = QF.unpack(self.weight_packed, self.length, dtype=self.scale.dtype)
        weight = signs.reshape(len(signs), *self.kernel_size, -1).movedim(-1, 1).contiguous()
        padding = self.padding
        if self.padding_value and any(padding):
            x = F.pad(x, [p for size in reversed(padding) for p in (size, size)], value=float(self.padding_value))
            padding = (0,) * self._spatial
        convolution: Callable[..., Tensor] = (F.conv1d, F.conv2d)[self._spatial - 1]
        channel = -self._spatial - 1
        y = convolution(x, weight, None, self.stride, padding, self.dilation, self.groups)
        return self._finish(y.movedim(channel, -1)).movedim(-1, channel)


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class PackedConv1d(_PackedConv):
    """A `BinaryConv1d` with packed weights.

    Args:
        layer: is read, not changed.

    Shape:
        Floats `(batch, in_channels, length)`, the batch may be missing, or words `(batch, length, ceil(in_channels/64))`, to floats
        `(batch, out_channels, length')`, or to words `(batch, length', ceil(out_channels/64))` where a threshold is folded in.

    Raises: TypeError for weights that are not float32 or float64, ValueError for a weight binarizer that is not binary.
    """

    _spatial = 1
    _row: ClassVar[dict[str, tuple[int, ...]]] = {"kernel_size": (1,), "stride": (1,), "padding": (0,), "dilation": (1,)}

    def __init__(self, layer: BinaryConv1d) -> None:
        super().__init__(layer)


class PackedConv2d(_PackedConv):
    """A `BinaryConv2d` with packed weights.

    Args:
        layer: is read, not changed.

    Shape:
        Floats `(batch, in_channels, height, width)`, the batch may be missing, or words `(batch, height, width, ceil(in_channels/64))`, to
        floats `(batch, out_channels, height', width')`, or to words `(batch, height', width', ceil(out_channels/64))` where a threshold is
        folded in.

    Raises: TypeError for weights that are not float32 or float64, ValueError for a weight binarizer that is not binary.
    """

    _spatial = 2

    def __init__(self, layer: BinaryConv2d) -> None:
        super().__init__(layer)

    def residual(self, words: Tensor, gain: Tensor, shift: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
        """`packed_conv2d_residual` with the bounds of hardtanh, of words `(N, H, W, W64)` of the right width."""
        y, signs = _conv2d_residual_op.op(words, self.weight_packed, self.scale, gain, shift, shortcut, -1.0, 1.0, *self._geometry)
        return y, signs


class PackedMaxPool2d(nn.Module):
    """Max pooling on the bits behind a threshold that followed it in the float graph.

    Args:
        pool: without padding, dilation and rounding up.
        flip: bool (C,): channels in which the sign falls as the pooled value grows; None where the pooled value is the sign's own argument.

    Shape: Words `(N, H, W, ceil(C/64))` to `(N, H', W', ceil(C/64))`.
    """

    flip: Tensor | None

    def __init__(self, pool: nn.MaxPool2d, flip: Tensor | None) -> None:
        super().__init__()
        self.kernel_size, self.stride = _pair(pool.kernel_size), _pair(pool.stride)
        self.register_buffer("flip", flip)

    def forward(self, x: Tensor) -> Tensor:
        """Pool the words."""
        return QF.packed_max_pool2d(x, self.kernel_size, self.stride, flip=self.flip)

    def settings(self) -> dict[str, Any]:
        """What the layer is but for its tensors, in values that JSON knows."""
        return {"type": type(self).__name__, "kernel_size": list(self.kernel_size), "stride": list(self.stride)}

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width
