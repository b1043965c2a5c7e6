"""Weights that others published: the names of BiPer's and ReCU's checkpoints are turned into those of this package."""

from collections.abc import Mapping

from torch import Tensor, nn

from phyla.quantized.layers import BinaryConv1d, BinaryConv2d, BinaryLinear

__all__ = ["load_biper_state_dict"]

_UNUSED = ("tau", "beta")
_OWN = ("_extra_state", "num_batches_tracked")


def load_biper_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a checkpoint of the BiPer or ReCU repository into a model of this package, such as `resnet18` or `resnet20`.

    1. The prefix `module.` of a data-parallel wrapper goes.
    2. `alpha (out, 1, 1)` of a binary layer becomes its `scale (out,)`; its `tau` and `beta`, which its output does not depend on, go.
    3. The state of the binarizers stays as it is: the checkpoints do not hold the frequency, and the stage is `set_stage`'s.

    Args:
        model: its parameters and statistics are overwritten.
        state_dict: names and tensors of the checkpoint (its entry `state_dict`).

    Raises:
        TypeError: if a value is no tensor.
        ValueError: if names are unknown or missing, or a shape is another; nothing is loaded then.

    Source: the repositories edmav4/BiPer and z-hXu/ReCU, `BinarizeConv2d`.
    """
    binary = {name for name, module in model.named_modules() if isinstance(module, BinaryLinear | BinaryConv1d | BinaryConv2d)}
    given: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict: {name}: expected a Tensor, got {type(tensor).__name__}")
        layer, _, last = name.removeprefix("module.").rpartition(".")
        if layer in binary and last in _UNUSED:
            continue
        if layer in binary and last == "alpha":
            given[f"{layer}.scale" if layer else "scale"] = tensor.flatten()
        else:
            given[name.removeprefix("module.")] = tensor

    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    unknown = sorted(given.keys() - wanted.keys())
    missing = sorted(name for name in wanted.keys() - given.keys() if not name.endswith(_OWN))
    if unknown or missing:
        raise ValueError(f"state_dict: expected the names of {type(model).__name__}, got unknown {unknown} and missing {missing}")
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"state_dict: {name}: expected shape {tuple(wanted[name].shape)}, got {tuple(tensor.shape)}")
    model.load_state_dict(given, strict=False)
