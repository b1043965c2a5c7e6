"""State dicts of other code bases, brought to this package's names; each function returns a new dict and leaves its input alone.

Modules are found by their parameters' names anywhere in the state dict; entries of other modules pass through unchanged, and
tensors that need no arithmetic are passed on, not copied.
"""

from collections.abc import Mapping

from torch import Tensor

from phyla.kan_family.convert_vision import kat, timm_vit

__all__ = ["efficient_kan", "fast_kan", "kat", "pykan", "timm_vit"]


def _prefixes(state_dict: Mapping[str, Tensor], mark: str) -> list[str]:
    """Where the modules are: what stands before `mark` in the keys that end with it."""
    found = [key.removesuffix(mark) for key in state_dict if key == mark or key.endswith("." + mark)]
    if not found:
        raise ValueError(f"state_dict: expected a key that ends in {mark!r}, got {list(state_dict)[:8]}")
    return found


def _entry(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state_dict:
        raise ValueError(f"state_dict: expected the key {key!r}, got {list(state_dict)[:8]}")
    return state_dict[key]


def _per_input(weight: Tensor, functions: int) -> Tensor:
    """`(O, I * n)` as `(O, I, n)`."""
    return weight.reshape(len(weight), -1, functions)


def efficient_kan(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of efficient-kan's `KAN` or `KANLinear` for `KAN(widths, basis=BSpline(grid_size, spline_order), bias=False)`.

    Args:
        state_dict: Holds `grid`, `base_weight`, `spline_weight` and, where the layer was built with it, `spline_scaler`, for each
            layer; the scaler is multiplied into `coef`.

    Returns:
        `basis.knots`, `base_weight` and `coef` for each layer.

    Raises:
        ValueError: If there is no such layer or a layer is incomplete.

    Source: Blealtan/efficient-kan.
    """
    converted = dict(state_dict)
    for prefix in _prefixes(state_dict, "spline_weight"):
        coef = converted.pop(f"{prefix}spline_weight")
        scaler = converted.pop(f"{prefix}spline_scaler", None)
        converted[f"{prefix}coef"] = coef if scaler is None else coef * scaler.unsqueeze(-1)
        converted[f"{prefix}basis.knots"] = _entry(state_dict, f"{prefix}grid")
        _entry(state_dict, f"{prefix}base_weight")
        del converted[f"{prefix}grid"]
    return converted


def fast_kan(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of fast-kan's `FastKAN` or `FastKANLayer` for `KAN(widths, basis=RBF(num_grids, grid_range), norm="layer")`.

    A layer without base branch needs `base=None, bias=False`, one without layer norm `norm=None`. The width of the functions is not
    in the state dict: pass fast-kan's `denominator` as `RBF(width=...)` where it is not the default, the distance of two centres.

    Args:
        state_dict: Holds `rbf.grid (n,)`, `spline_linear.weight (O, I * n)` and, where the layer has them, `layernorm.*` and
            `base_linear.*`, for each layer.

    Returns:
        `basis.centers`, `coef` and, from the optional parts, `norm.*`, `base_weight` and `bias`, for each layer.

    Raises:
        ValueError: If there is no such layer or a layer is incomplete.

    Source: ZiyaoLi/fast-kan.
    """
    converted = dict(state_dict)
    names = {
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
        "base_linear.weight": "base_weight",
        "base_linear.bias": "bias",
    }
    for prefix in _prefixes(state_dict, "spline_linear.weight"):
        centers = _entry(state_dict, f"{prefix}rbf.grid")
        del converted[f"{prefix}rbf.grid"]
        converted[f"{prefix}basis.centers"] = centers
        converted[f"{prefix}coef"] = _per_input(converted.pop(f"{prefix}spline_linear.weight"), len(centers))
        for old, new in names.items():
            if f"{prefix}{old}" in state_dict:
                converted[f"{prefix}{new}"] = converted.pop(f"{prefix}{old}")
    return converted


def pykan(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of pykan's `KAN` (`MultKAN`) for `KAN(widths, basis=BSpline(grid, k), bias=True)`.

    Scales, masks and the affine maps of the nodes are multiplied into `coef`, `base_weight` and `bias`. pykan's `input_id` (the
    inputs that are left after pruning) is dropped: select them with it before the model.

    Args:
        state_dict: Holds `act_fun.l.{grid, coef, scale_base, scale_sp, mask}`, `symbolic_fun.l.mask`, `node_scale_l`, `node_bias_l`,
            `subnode_scale_l` and `subnode_bias_l`; scales of nodes that are missing count as 1, biases as 0.

    Returns:
        `layers.l.basis.knots`, `layers.l.coef`, `layers.l.base_weight` and `layers.l.bias`.

    Raises:
        ValueError: If there are no such layers, a layer is incomplete, an edge is symbolic, or a node multiplies.

    Source: KindXiaoming/pykan.
    """
    converted: dict[str, Tensor] = {}
    depth = len(_prefixes(state_dict, "coef"))
    for layer in range(depth):
        knots, coef_IOK, scale_base_IO, scale_spline_IO, mask_IO = (
            _entry(state_dict, f"act_fun.{layer}.{name}") for name in ("grid", "coef", "scale_base", "scale_sp", "mask")
        )
        symbolic = state_dict.get(f"symbolic_fun.{layer}.mask")
        if symbolic is not None and bool((symbolic != 0).any()):
            raise ValueError(f"state_dict: expected no symbolic edges, got {int((symbolic != 0).sum())} in symbolic_fun.{layer}.mask")
        ones, zeros = coef_IOK.new_ones(coef_IOK.shape[1]), coef_IOK.new_zeros(coef_IOK.shape[1])
        inner_scale, inner_bias = state_dict.get(f"subnode_scale_{layer}", ones), state_dict.get(f"subnode_bias_{layer}", zeros)
        scale, bias = state_dict.get(f"node_scale_{layer}", ones), state_dict.get(f"node_bias_{layer}", zeros)
        if scale.shape != inner_scale.shape:
            raise ValueError(
                f"state_dict: expected no multiplication nodes, got {len(inner_scale)} sums that make {len(scale)} nodes in layer {layer}"
            )
        factor_OI = (mask_IO * (inner_scale * scale)).T
        converted[f"layers.{layer}.basis.knots"] = knots
        converted[f"layers.{layer}.coef"] = coef_IOK.transpose(0, 1) * (scale_spline_IO.T * factor_OI).unsqueeze(-1)
        converted[f"layers.{layer}.base_weight"] = scale_base_IO.T * factor_OI
        converted[f"layers.{layer}.bias"] = inner_bias * scale + bias
    return converted
