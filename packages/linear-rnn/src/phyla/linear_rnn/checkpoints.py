"""Weights of the public flash-linear-attention models under this package's names."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_WRAPPERS = re.compile(r"^((module|_orig_mod|model)\.)+")
_PLACE = re.compile(r"^(layers\.\d+\.)?attn\.")
_PER_REFLECTION = re.compile(r"^(?P<layer>.*\.)?(?P<kind>[kvb]_(proj|conv1d))s\.(?P<j>\d+)\.(?P<last>weight|bias)$")


def load_fla_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a checkpoint of flash-linear-attention, or of the DeltaProduct paper's own repository, into a layer or a `LinearRNNLM`.

    1. The prefixes of wrappers (`model.`, `module.`) go, and for a single layer its place in a model (`layers.3.attn.`).
    2. Projections and convolutions with one module a reflection (`k_projs.j.weight`, `k_conv1ds.j.weight`, likewise v and b) are joined
       into `k_proj`, `k_conv1d`, reflection after reflection.
    3. The norm of the heads is called `o_norm`, also where it was `g_norm_swish_gate` or `g_norm`.
    4. A `gate_proj` that holds gate and up-projection of the SwiGLU in one is split.

    Args:
        model: The layer or model; its parameters are overwritten.
        state_dict: The checkpoint's names and tensors.

    Raises:
        ValueError: If names are unknown or missing, two name the same parameter, or a shape is another; nothing is loaded then.

    Source: the parameter names of fla-org/flash-linear-attention and automl/DeltaProduct.
    """
    wanted = model.state_dict()
    lone = not any(name.startswith("layers.") for name in wanted)
    given: dict[str, Tensor] = {}
    for name, tensor in _joined({_WRAPPERS.sub("", name): tensor for name, tensor in state_dict.items()}).items():
        ours = _renamed(_PLACE.sub("", name) if lone else name, wanted)
        if ours in given:
            raise ValueError(f"state_dict: {name}: expected one tensor for {ours}, got several")
        given[ours] = tensor
    for name in [n for n in given if n.endswith("mlp.gate_proj.weight")]:
        up = name.replace("gate_proj", "up_proj")
        if up not in given and up in wanted and given[name].shape[0] == 2 * wanted[name].shape[0]:
            given[name], given[up] = given[name].chunk(2)

    loaded = {wanted[name].data_ptr() for name in given if name in wanted}  # a tied weight comes under one of its names
    unknown = sorted(name for name in given if name not in wanted)
    missing = sorted(name for name, tensor in wanted.items() if name not in given and tensor.data_ptr() not in loaded)
    if unknown or missing:
        raise ValueError(f"state_dict: expected the names of {type(model).__name__}, got unknown {unknown} and missing {missing}")
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"state_dict: {name}: expected shape {tuple(wanted[name].shape)}, got {tuple(tensor.shape)}")
    model.load_state_dict(given, strict=False)


def _joined(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Modules of single reflections joined along their outputs."""
    result, parts = {}, dict[str, dict[int, Tensor]]()
    for name, tensor in given.items():
        found = _PER_REFLECTION.match(name)
        if found is None:
            result[name] = tensor
        else:
            joint = f"{found['layer'] or ''}{found['kind']}.{found['last']}"
            parts.setdefault(joint, {})[int(found["j"])] = tensor
    for name, reflections in parts.items():
        if sorted(reflections) != list(range(len(reflections))):
            raise ValueError(f"state_dict: {name}: expected reflections 0 to {len(reflections) - 1}, got {sorted(reflections)}")
        result[name] = torch.cat([reflections[j] for j in range(len(reflections))])
    return result


def _renamed(name: str, wanted: Mapping[str, Tensor]) -> str:
    """The name of the norm of the heads in this package, where `name` is another one of it."""
    ours = re.sub(r"(^|\.)(g_norm_swish_gate|g_norm)\.weight$", r"\1o_norm.weight", name)
    return ours if name not in wanted and ours in wanted else name
