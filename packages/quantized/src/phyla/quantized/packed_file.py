"""Packed models in files: safetensors with the settings of every packed layer, read with distrust.

safetensors itself checks the header, and that the tensors fill the file without gaps and overlaps. What it does not know is checked here:
the format, the settings, names, shapes and dtypes of the model, and the values that packed arithmetic relies on.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from phyla.quantized.binarizers import BiPer
from phyla.quantized.layers import BinaryLayer
from phyla.quantized.packed import PackedLayer
from phyla.quantized.packing import pack, packed_settings

__all__ = ["load_packed", "save_packed"]

_FORMAT = "phyla-quantized-1"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

Path = str | os.PathLike[str]


def save_packed(model: nn.Module, path: Path) -> None:
    """Write a packed model to a safetensors file.

    The metadata are `format`, "phyla-quantized-1", and `layers`, the settings of every packed layer by name, as JSON.

    Args:
        model: what `pack` returned.
        path: of the file; an existing one is overwritten.

    Raises:
        TypeError: if a part of the state is no tensor.
        ValueError: if the model has no packed layer.
        OSError: if the file cannot be written.
    """
    settings = packed_settings(model)
    if not settings:
        raise ValueError("model: expected a packed model, got one without packed layers: call pack(model) first")
    tensors = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model: {name}: expected a Tensor, got {type(value).__name__}")
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        save_file(tensors, path, {"format": _FORMAT, "layers": json.dumps(settings, sort_keys=True)})
    except SafetensorError as error:
        raise OSError(f"path: cannot write {os.fspath(path)}: {error}") from None


def load_packed(model: nn.Module, path: Path) -> nn.Module:
    """Read a packed model from a file of `save_packed`.

    Args:
        model: of the same architecture: an unpacked one with whatever weights, or a packed one; it is not changed.
        path: of the file.

    Returns: a packed model with the tensors of the file, in eval mode.
    Raises:
        ValueError: if the file is damaged or no packed model, or belongs to another architecture: a name, shape, dtype or setting differs.
        OSError: if the file cannot be opened.
    """
    tensors, layers = _read(path)
    packed = _skeleton(model, layers)
    wanted = packed.state_dict()
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(f"path: expected the tensors of {type(model).__name__}, got a file without {missing} and with unknown {unknown}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise ValueError(f"path: {name}: expected {_kind(wanted[name])}, got {_kind(tensor)}")
    for name, part in packed.named_modules():
        if isinstance(part, PackedLayer):
            _check_values(name, part, {key: tensors[f"{name}.{key}" if name else key] for key, _ in part.named_buffers(recurse=False)})
    packed.load_state_dict(tensors)
    return packed


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the layers' settings of a file. Raises: ValueError, OSError."""
    where = os.fspath(path)
    with open(where, "rb"):  # a missing file is an OSError of its own kind
        pass
    try:
        with safe_open(where, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"path: {where}: expected format {_FORMAT!r}, got {metadata.get('format')!r}")
            for name in file.keys():  # noqa: SIM118
                if file.get_slice(name).get_dtype() not in _DTYPES:
                    raise ValueError(f"path: {name}: expected one of {sorted(_DTYPES)}, got {file.get_slice(name).get_dtype()}")
            return {name: _tensor(name, file.get_tensor(name)) for name in file.keys()}, _layers(metadata.get("layers"))  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path: {where}: expected a safetensors file, got one that is damaged or of another kind: {error}") from None


def _tensor(name: str, tensor: Tensor) -> Tensor:
    """A copy of the tensor. Raises: ValueError if it holds truth values that are neither 0 nor 1."""
    if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise ValueError(f"path: {name}: expected bytes 0 and 1, got others")
    return tensor.clone()


def _layers(text: str | None) -> dict[str, Any]:
    try:
        layers = json.loads(text) if text is not None else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: layers: expected JSON, got a text that is none: {error}") from None
    if not isinstance(layers, dict):
        raise ValueError(f"path: layers: expected a JSON object, got {type(layers).__name__}")
    return layers


def _skeleton(model: nn.Module, layers: Mapping[str, Any]) -> nn.Module:
    """The packed form of the model, folded or not, that has the file's settings. Raises: ValueError."""
    if packed_settings(model):
        candidates = [copy.deepcopy(model).eval()]
    else:
        binary = copy.deepcopy(model)
        for part in binary.modules():
            if isinstance(part, BinaryLayer) and isinstance(part.weight_binarizer, BiPer):
                part.weight_binarizer.stage = 2
        candidates = [pack(binary, fold=fold) for fold in (True, False)]
    for packed in candidates:
        if packed_settings(packed) == layers:
            return packed
    ours = packed_settings(candidates[0])
    name = next(name for name in sorted(ours.keys() | layers.keys()) if ours.get(name) != layers.get(name))
    raise ValueError(f"path: layer {name}: expected {ours.get(name)}, got {layers.get(name)}")


def _check_values(name: str, layer: PackedLayer, tensors: Mapping[str, Tensor]) -> None:
    """What arithmetic on words relies on. Raises: ValueError."""
    used = layer.length % 64
    if used and bool((tensors["weight_packed"][:, -1] >> used).any()):
        raise ValueError(f"path: {name}.weight_packed: expected zeros behind the {layer.length} bits of a row, got others")
    if "threshold" in tensors:
        low, high = (int(value) for value in torch.aminmax(tensors["threshold"]))
        if low < -layer.length or high > layer.length + 1:
            wanted = f"[{-layer.length}, {layer.length + 1}]"
            raise ValueError(f"path: {name}.threshold: expected values in {wanted}, got {low} to {high}")
