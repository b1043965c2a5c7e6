"""State dicts of other vision transformers, converted for `VisionTransformer`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from phyla.kan_family.rational import Function, initial_coefficients
from phyla.shared import checks

_RENAMED = {"weight_numerator": "numerator", "weight_denominator": "denominator"}


def kat(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released KAT checkpoint's parameters; tensors are shared, not copied.

    Args:
        state_dict: With `weight_numerator` and `weight_denominator` in each rational activation.

    Returns:
        State dict of a `VisionTransformer(mlp="grkan")` of the same sizes (or of the part of it that was given).

    Raises:
        ValueError: If no rational activation is found.
    """
    if not any(name.rpartition(".")[2] in _RENAMED for name in state_dict):
        raise ValueError(f"state_dict: expected parameters named weight_numerator, got {_first_names(state_dict)}")
    converted = {}
    for name, value in state_dict.items():
        parent, dot, last = name.rpartition(".")
        converted[parent + dot + _RENAMED.get(last, last)] = value
    return converted


def timm_vit(state_dict: Mapping[str, Tensor], *, num_groups: int = 8, init: str | Function = "gelu") -> dict[str, Tensor]:
    """Turn a pretrained timm vision transformer into a KAT that starts with nearly the same outputs.

    Each MLP becomes a GR-KAN: the first rational starts as the identity, the second as the MLP's activation. Tensors are shared.

    Args:
        state_dict: Of a vision transformer with `blocks.i.mlp.fc1` and `fc2`, class token and position embedding.
        num_groups: Groups of the rational activations.
        init: The activation of the MLPs.

    Returns:
        State dict of a `VisionTransformer(mlp="grkan", num_groups=num_groups)` of the same sizes.

    Raises:
        ValueError: If no `mlp.fc1.weight` is found, or `num_groups` does not divide its sizes.

    Source: "Kolmogorov-Arnold Transformer", section 4.4 (start from a pretrained ViT).
    """
    checks.positive_int("num_groups", num_groups)
    converted = dict(state_dict)
    first_layers = [name for name in state_dict if name.endswith("mlp.fc1.weight")]
    if not first_layers:
        raise ValueError(f"state_dict: expected parameters named blocks.i.mlp.fc1.weight, got {_first_names(state_dict)}")
    for name in first_layers:
        weight = state_dict[name]
        if weight.shape[0] % num_groups or weight.shape[1] % num_groups:
            raise ValueError(f"num_groups: must divide the sizes of {name}, got num_groups={num_groups}, shape {tuple(weight.shape)}")
        for act, start in (("act1", "identity"), ("act2", init)):
            numerator, denominator = initial_coefficients(start)
            prefix = name.removesuffix("fc1.weight") + act
            converted[f"{prefix}.numerator"] = numerator.to(weight)[None]
            converted[f"{prefix}.denominator"] = torch.tile(denominator.to(weight), (num_groups, 1))
    return converted


def _first_names(state_dict: Mapping[str, Tensor]) -> str:
    names = list(state_dict)
    return f"{names[:3]} and {len(names) - 3} more" if len(names) > 3 else str(names)
