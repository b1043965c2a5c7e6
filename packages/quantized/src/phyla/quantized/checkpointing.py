"""One-bit checkpointing: the binary input of an operation is kept for its backward pass as bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phyla.quantized import functional as QF


@dataclass(frozen=True)
class _Bits:
    """A tensor of -1 and +1 as words, in the order of its memory, so that it comes back with the same strides."""

    words: Tensor
    shape: torch.Size
    order: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> _Bits:
        order = tuple(sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True))
        ordered = x.permute(order)
        return _Bits(QF.pack(ordered.reshape(-1)), ordered.shape, order, x.dtype)

    def tensor(self) -> Tensor:
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return QF.unpack(self.words, self.shape.numel(), dtype=self.dtype).view(self.shape).permute(back)


def saving_bits(operation: Callable[[Tensor, Tensor], Tensor], binary: Tensor, weight: Tensor) -> Tensor:
    """`operation(binary, weight)`, with `binary` kept for backward as one bit an element where autograd would keep it whole.

    Values and gradients of every order are those of the plain call. The transforms of ``torch.func`` do not allow hooks on what is saved,
    and ``torch.compile`` decides itself what is kept: both run the plain call.

    Args:
        operation: A torch function of the two tensors, such as a convolution.
        binary: Tensor of -1 and +1.
        weight: Any tensor.

    Source: "Training Deep Nets with Sublinear Memory Cost" (checkpointing); the bits are those of `functional.pack`.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return operation(binary, weight)
    if torch.is_autocast_enabled(binary.device.type):  # else the operation would keep its own cast copy
        binary = binary.to(torch.get_autocast_dtype(binary.device.type))

    pointer, count = binary.data_ptr(), binary.numel()  # autograd holds the hooks, and through them all that they name

    def keep(saved: Tensor) -> Tensor | _Bits:
        return _Bits.of(saved) if saved.data_ptr() == pointer and saved.numel() == count else saved

    def give(kept: Tensor | _Bits) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.tensor()

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        return operation(binary, weight)
