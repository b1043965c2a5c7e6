"""The networks on which binarizers are compared: VGG-small, ResNet-20 and ResNet-18 for CIFAR-sized images.

The first convolution and the last linear layer are float32, all other convolutions binary. Names of modules are those of the published
ReCU, IR-Net and BiPer codes, so that their checkpoints load (`load_biper_state_dict`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, TypedDict, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from phyla.quantized.binarizers import ApproxSign, Binarizer, BiPer
from phyla.quantized.layers import BinaryConv2d
from phyla.shared import checks

__all__ = ["BinaryBlock", "BinaryOptions", "ResNet", "resnet18", "resnet20", "vgg_small"]


class BinaryOptions(TypedDict, total=False):
    """How the binary convolutions of a model are built; what is left out is BiPer's recipe.

    Attributes:
        weight_binarizer: builds the binarizer of a layer's weights; `BiPer` (stage 1).
        input_binarizer: builds the binarizer of a layer's input; `ApproxSign`.
        scale: see `BinaryConv2d`; `"learned"`.
        normalize_input: see `BinaryConv2d`; True, as ReCU and BiPer published it (IR-Net: False).
        padding_value: see `BinaryConv2d`; 0.
    """

    weight_binarizer: Callable[[], Binarizer]
    input_binarizer: Callable[[], nn.Module]
    scale: Literal["learned", "mean_abs", "none"]
    normalize_input: bool
    padding_value: Literal[0, 1, -1]


def _conv3x3(inputs: int, outputs: int, stride: int = 1, **options: Unpack[BinaryOptions]) -> BinaryConv2d:
    """A binary 3 x 3 convolution, padded by one."""
    return BinaryConv2d(
        inputs,
        outputs,
        3,
        stride=stride,
        padding=1,
        padding_value=options.get("padding_value", 0),
        weight_binarizer=options.get("weight_binarizer", BiPer)(),
        input_binarizer=options.get("input_binarizer", ApproxSign)(),
        scale=options.get("scale", "learned"),
        normalize_input=options.get("normalize_input", True),
    )


def _float_conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return conv


def vgg_small(
    num_classes: int = 10, *, width: int = 128, in_channels: int = 3, image_size: int = 32, **binary: Unpack[BinaryOptions]
) -> nn.Sequential:
    """VGG-small: a float convolution, five binary ones of w, 2w, 2w, 4w, 4w channels with three poolings, one linear layer.

    Args:
        num_classes: outputs.
        width: w; 4.66 million parameters at 128.
        in_channels: channels of the images.
        image_size: height and width of the images, a multiple of 8.
        binary: options of the binary convolutions (`BinaryOptions`).

    Returns: a model from `(N, in_channels, image_size, image_size)` to `(N, num_classes)`.
    Raises: TypeError, ValueError naming the argument.
    Source: the network of *LQ-Nets*, as *IR-Net* and *ReCU* binarize it.
    """
    w = checks.positive_int("width", width)
    if checks.positive_int("image_size", image_size) % 8:
        raise ValueError(f"image_size: expected a multiple of 8, got {image_size}")
    parts: OrderedDict[str, nn.Module] = OrderedDict(conv0=_float_conv3x3(checks.positive_int("in_channels", in_channels), w))
    parts |= {"bn0": nn.BatchNorm2d(w), "nonlinear0": nn.Hardtanh()}
    inputs = w
    for i, (outputs, pooled) in enumerate([(w, True), (2 * w, False), (2 * w, True), (4 * w, False), (4 * w, True)], 1):
        parts[f"conv{i}"] = _conv3x3(inputs, outputs, **binary)
        if pooled:
            parts[f"pool{i}"] = nn.MaxPool2d(2)
        parts |= {f"bn{i}": nn.BatchNorm2d(outputs), f"nonlinear{i}": nn.Hardtanh()}
        inputs = outputs
    features = 4 * w * (image_size // 8) ** 2
    parts |= {"flatten": nn.Flatten(), "fc": nn.Linear(features, checks.positive_int("num_classes", num_classes))}
    return nn.Sequential(parts)


class Shortcut(nn.Module):
    """The parameter-free path around a block that changes the shape: averages of 2 x 2 pixels, zeros for the new channels on both sides."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        if planes < in_planes:
            raise ValueError(f"widths: expected a sequence that does not decrease, got {planes} after {in_planes}")
        self.stride = stride
        self.pad = ((planes - in_planes) // 2, (planes - in_planes + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_planes, H, W)` to `(N, planes, H / stride, W / stride)`.

        Raises: ValueError if H or W is not a multiple of the stride.
        """
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(f"x: expected height and width that are even before each halving, got shape {tuple(x.shape)}")
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        return F.pad(x, (0, 0, 0, 0, *self.pad)) if any(self.pad) else x

    def extra_repr(self) -> str:
        """Stride and new channels, for printing."""
        return f"stride={self.stride}, pad={self.pad}"


class BinaryBlock(nn.Module):
    """Two binary convolutions, each with its own way around: `y = h(bn1(conv1(x)) + s(x))`, `z = h(bn2(conv2(y)) + y)`, h = hardtanh.

    Args:
        in_planes: channels of x.
        planes: channels of y and z.
        stride: of conv1.
        binary: options of the convolutions (`BinaryOptions`).

    Source: *Bi-Real Net*, section 3.1, with the activations and the shortcut s of the codes of *IR-Net* and *ReCU*.
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1, **binary: Unpack[BinaryOptions]) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_planes, planes, stride, **binary)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, **binary)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Identity() if stride == 1 and in_planes == planes else Shortcut(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_planes, H, W)` to `(N, planes, H / stride, W / stride)`."""
        y = F.hardtanh(self.bn1(self.conv1(x)) + self.shortcut(x))
        return F.hardtanh(self.bn2(self.conv2(y)) + y)


class ResNet(nn.Module):
    """A float convolution, layers of binary blocks, each layer but the first at half the resolution, and a float head.

    Args:
        blocks: blocks of each layer.
        widths: channels of each layer.
        num_classes: outputs.
        in_channels: channels of the images.
        stem_hardtanh: whether a hardtanh follows the first batch normalisation.
        binary: options of the binary convolutions (`BinaryOptions`).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        stem_hardtanh: bool = True,
        **binary: Unpack[BinaryOptions],
    ) -> None:
        super().__init__()
        if not blocks or len(blocks) != len(widths):
            raise ValueError(f"widths: expected one width for each of {len(blocks)} layers, got {tuple(widths)}")
        widths = [checks.positive_int("widths", width) for width in widths]
        self.conv1 = _float_conv3x3(checks.positive_int("in_channels", in_channels), widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.nonlinear1 = nn.Hardtanh() if stem_hardtanh else nn.Identity()
        self.depth = len(blocks)
        planes = widths[0]
        for i, (number, width) in enumerate(zip(blocks, widths, strict=True)):
            layer = nn.Sequential()
            for j in range(checks.positive_int("blocks", number)):
                layer.append(BinaryBlock(planes, width, 2 if i > 0 and j == 0 else 1, **binary))
                planes = width
            setattr(self, f"layer{i + 1}", layer)
        self.bn2 = nn.BatchNorm1d(planes)
        self.linear = nn.Linear(planes, checks.positive_int("num_classes", num_classes))

    @property
    def layers(self) -> list[nn.Sequential]:
        """`layer1`, `layer2`, ..."""
        return [self.get_submodule(f"layer{i + 1}") for i in range(self.depth)]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(N, in_channels, H, W)` to `(N, num_classes)`; H and W are multiples of 2^(layers - 1)."""
        y = self.nonlinear1(self.bn1(self.conv1(x)))
        for layer in self.layers:
            y = layer(y)
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        out: Tensor = self.linear(self.bn2(y))
        return out


def resnet20(num_classes: int = 10, *, width: int = 16, in_channels: int = 3, **binary: Unpack[BinaryOptions]) -> ResNet:
    """ResNet-20 for images of CIFAR size: three layers of three blocks with w, 2w and 4w channels.

    Args:
        num_classes: outputs.
        width: w.
        in_channels: channels of the images.
        binary: options of the binary convolutions (`BinaryOptions`).

    Raises: TypeError, ValueError naming the argument.
    Source: the code of *IR-Net*, CIFAR-10, ResNet-20 1w1a.
    """
    w = checks.positive_int("width", width)
    return ResNet((3, 3, 3), (w, 2 * w, 4 * w), num_classes=num_classes, in_channels=in_channels, **binary)


def resnet18(
    num_classes: int = 10, *, widths: Sequence[int] = (64, 128, 256, 512), in_channels: int = 3, **binary: Unpack[BinaryOptions]
) -> ResNet:
    """ResNet-18 for images of CIFAR size: four layers of two blocks, no activation after the first batch normalisation.

    Args:
        num_classes: outputs.
        widths: channels of the four layers; 11.01 million parameters by default.
        in_channels: channels of the images.
        binary: options of the binary convolutions (`BinaryOptions`).

    Raises: TypeError, ValueError naming the argument.
    Source: *BiPer*, section 4; the block is that of `resnet20`.
    """
    return ResNet((2, 2, 2, 2), widths, num_classes=num_classes, in_channels=in_channels, stem_hardtanh=False, **binary)
