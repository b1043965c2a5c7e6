"""Turn a float model into a binary one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from torch import nn

from phyla.quantized.binarizers import Binarizer
from phyla.quantized.layers import BinaryConv1d, BinaryConv2d, BinaryLinear, PaddingValue, Scale

_CONVOLUTIONS: dict[type[nn.Module], type[BinaryConv1d] | type[BinaryConv2d]] = {nn.Conv1d: BinaryConv1d, nn.Conv2d: BinaryConv2d}


def binarize_model(
    model: nn.Module,
    *,
    weight_binarizer: Callable[[], Binarizer],
    input_binarizer: Callable[[], nn.Module],
    skip: Sequence[str] | Literal["first_last"] = "first_last",
    scale: Scale = "learned",
    normalize_input: bool = False,
    padding_value: PaddingValue = 0,
    save_bits: bool = False,
) -> nn.Module:
    """A deep copy of `model` whose `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` layers are binary layers with the same weights.

    Layers of exactly these types count, in the order of `named_modules`; a layer that stands in two places is replaced by one layer.
    Learned factors start at the mean absolute weight of their channel, so that outputs keep their size.

    Args:
        model: Any model; it is left as it is.
        weight_binarizer: Builds the binarizer of a layer's weights, called once a layer.
        input_binarizer: Builds the binarizer of a layer's inputs, or `nn.Identity`, called once a layer.
        skip: Names of layers that stay real (a name counts for all below it), or "first_last": the first and the last layer.
        scale: As in `BinaryLinear`, like `normalize_input` and `save_bits`.
        normalize_input: As in `BinaryLinear`.
        padding_value: As in `BinaryConv2d`.
        save_bits: As in `BinaryLinear`.

    Returns:
        The binary model.

    Raises:
        ValueError: If a name in `skip` is none of the model's, or a layer pads in a way that no binary layer has.

    Source: "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", section 4 (first and last layer stay real).
    """
    model = copy.deepcopy(model)
    layers = [(name, m) for name, m in model.named_modules() if type(m) in (nn.Linear, *_CONVOLUTIONS)]
    chosen = dict(layers[1:-1]) if skip == "first_last" else {n: m for n, m in layers if not _below(n, _known(model, skip))}
    options: dict[str, Any] = {"scale": scale, "normalize_input": normalize_input, "save_bits": save_bits}
    new = {
        layer: _binary(name, layer, padding_value, options | {"weight_binarizer": weight_binarizer(), "input_binarizer": input_binarizer()})
        for name, layer in chosen.items()
    }
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # not named_children, which tells one name of a layer
            if child in new:
                setattr(parent, name, new[child])
    return new.get(model, model)


def _known(model: nn.Module, skip: Sequence[str]) -> Sequence[str]:
    names = dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in skip if name not in names]
    if isinstance(skip, str) or unknown:
        raise ValueError(f"skip: expected 'first_last' or names of the model's modules, got {skip if isinstance(skip, str) else unknown}")
    return skip


def _below(name: str, roots: Sequence[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _padding(name: str, layer: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    if layer.padding_mode != "zeros":
        raise ValueError(f"{name}: expected padding_mode 'zeros', which binary layers have, got {layer.padding_mode!r}; name it in skip")
    if isinstance(layer.padding, str):
        added = [d * (k - 1) if layer.padding == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(total % 2 for total in added):
            raise ValueError(f"{name}: expected equal padding on both sides, got 'same' with kernel {layer.kernel_size}; name it in skip")
        return tuple(total // 2 for total in added)
    return layer.padding


def _binary(name: str, layer: nn.Module, padding_value: PaddingValue, options: dict[str, Any]) -> nn.Module:
    """The binary layer with the weights, the bias and the mode of `layer`."""
    options |= {"device": "meta", "dtype": layer.weight.dtype}
    new: BinaryLinear | BinaryConv1d | BinaryConv2d
    if isinstance(layer, nn.Linear):
        new = BinaryLinear(layer.in_features, layer.out_features, layer.bias is not None, **options)
    else:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        new = _CONVOLUTIONS[type(layer)](
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            _padding(name, layer),
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            padding_value=padding_value,
            **options,
        )
    new.weight, new.bias = cast(nn.Parameter, layer.weight), cast(nn.Parameter | None, layer.bias)
    if new.scale is not None:
        new.scale = nn.Parameter(layer.weight.detach().abs().flatten(1).mean(1))
    return new.train(layer.training)
