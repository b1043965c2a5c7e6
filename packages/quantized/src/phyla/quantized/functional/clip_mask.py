"""The sign whose backward pass keeps one bit an element: whether the element lay inside the clip."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from phyla.shared.kernels import Op, transformed

_BITS = 64


def hard_sign(x: Tensor) -> Tensor:
    """-1 where x < 0, else +1 (also at 0, -0.0 and NaN); x without a gradient, in its dtype."""
    return 1 - 2 * (x < 0).to(x.dtype)


def straight(value: Tensor, soft: Tensor) -> Tensor:
    """``value``, exactly, with the derivatives of ``soft``, which must be finite."""
    return value + (soft - soft.detach())


def _pack_mask(inside: Tensor) -> Tensor:
    words = F.pad(inside.reshape(-1).long(), (0, -inside.numel() % _BITS)).view(-1, _BITS)
    return (words << torch.arange(_BITS, device=inside.device)).sum(1)


def _unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    bits = mask[:, None] >> torch.arange(_BITS, device=mask.device) & 1
    return bits.view(-1)[: like.numel()].view(like.shape).bool()


def _sign_and_mask(x: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    return hard_sign(x), _pack_mask(x.abs() <= clip)


def _keep_inside(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.where(_unpack_mask(mask, grad), grad, torch.zeros_like(grad))


_sign = Op(
    "phyla_quantized::hard_sign(Tensor x) -> Tensor",
    lambda x: hard_sign(x).contiguous(),
    fake=lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_masked_sign = Op(
    "phyla_quantized::sign_and_mask(Tensor x, float clip) -> (Tensor, Tensor)",
    lambda x, clip: tuple(t.contiguous() for t in _sign_and_mask(x, clip)),
    fake=lambda x, clip: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((x.numel() + _BITS - 1) // _BITS, dtype=torch.int64),
    ),
)
_inside = Op(
    "phyla_quantized::keep_inside(Tensor grad, Tensor mask) -> Tensor",
    lambda grad, mask: _keep_inside(grad, mask).contiguous(),
    fake=lambda grad, mask: torch.empty_like(grad, memory_format=torch.contiguous_format),
)


def _computed(x: Tensor) -> Tensor:
    """x in a dtype of the native kernels."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _Traced(torch.autograd.Function):
    """What Dynamo traces: forward and first-order backward by the ops. Without a clip the mask is empty and every gradient passes."""

    @staticmethod
    def forward(x: Tensor, clip: float | None) -> Any:
        if clip is None:
            return _sign.op(_computed(x)).to(x.dtype), x.new_empty(0, dtype=torch.int64)
        value, mask = _masked_sign.op(_computed(x), clip)
        return value.to(x.dtype), mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.clipped = inputs[1] is not None
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0]
        return _inside.op(_computed(grad), ctx.saved_tensors[0]).to(grad.dtype) if ctx.clipped else grad, None


class _Eager(_Traced):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Traced.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled() and ctx.clipped:  # a further derivative may be asked for
            return _keep_inside(grads[0], ctx.saved_tensors[0]), None
        return _Traced.backward(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, clip: float | None) -> Any:
        bound = float("inf") if clip is None else clip
        return torch.vmap(lambda row: _sign_and_mask(row, bound), in_dims=(in_dims[0],))(x), (0, 0)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _keep_inside(tangents[0], ctx.saved_tensors[0]) if ctx.clipped else tangents[0].view_as(tangents[0]), None


def masked_sign(x: Tensor, clip: float | None) -> Tensor:
    """sign(x); its gradient passes where abs(x) <= clip, everywhere for None. One bit an element is kept for backward, nothing for None."""
    if torch.compiler.is_compiling():
        return cast(Tensor, cast(Any, _Traced).apply(x, clip)[0])
    if transformed() or (torch.is_grad_enabled() and x.requires_grad):
        return cast(Tensor, cast(Any, _Eager).apply(x, clip)[0])
    return cast(Tensor, _sign.op(_computed(x)).to(x.dtype))
