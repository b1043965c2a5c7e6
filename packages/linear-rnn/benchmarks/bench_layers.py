"""The short convolution and the mLSTM beside plain torch; a training step and a decoded token of each layer beside its torch path.

Run: python benchmarks/bench_layers.py [--threads 2] [--only mLSTM]
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from phyla.linear_rnn import MLSTM, RWKV7, DeltaNet, DeltaProduct, GatedDeltaNet, GatedLinearAttention, KimiDeltaAttention, Mamba2
from phyla.linear_rnn._layers import Recurrent
from phyla.linear_rnn.functional import causal_conv1d, mlstm
from phyla.linear_rnn.functional.conv import _causal_conv1d
from phyla.shared.bench import Case, Step, main
from phyla.shared.kernels import Kernel

Function = Callable[..., Tensor]


def timed(function: Function, leaves: list[Tensor], backward: bool) -> Step:
    grad = torch.randn_like(function(*leaves))

    def forward_only() -> object:
        with torch.no_grad():
            return function(*leaves)

    return (lambda: torch.autograd.grad(function(*leaves), leaves, grad)) if backward else forward_only


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu")[0]


def conv_plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = _causal_conv1d.plain(x, weight, bias, None, None, True)[0]
    return y


def conv_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch's depthwise Conv1d, which wants time last."""
    width = weight.shape[1]
    return F.silu(F.conv1d(x.mT, weight.unsqueeze(1), bias, groups=x.shape[2], padding=width - 1)[..., : x.shape[1]]).mT


def conv_step(function: Function, batch: int, tokens: int, channels: int, backward: bool, compiled: bool = False) -> Step:
    torch.manual_seed(0)
    leaves = [torch.randn(s, requires_grad=True) for s in ((batch, tokens, channels), (channels, 4), (channels,))]
    return timed(torch.compile(function) if compiled else function, leaves, backward)


def conv_case(batch: int, tokens: int, channels: int, backward: bool) -> Case:
    arguments = (batch, tokens, channels, backward)
    moved = batch * tokens * channels * 4
    return Case(
        f"convolution {batch} x {tokens} x {channels}, forward{' + backward' if backward else ''}",
        {
            "phyla": partial(conv_step, conv, *arguments),
            "torch Conv1d": partial(conv_step, conv_torch, *arguments),
            "own torch path": partial(conv_step, conv_plain, *arguments),
            "own torch path, compiled": partial(conv_step, conv_plain, *arguments, compiled=True),
        },
        bytes=(5 if backward else 2) * moved,
    )


def mlstm_native(*tensors: Tensor) -> Tensor:
    return mlstm(*tensors)[0]


def mlstm_plain(*tensors: Tensor) -> Tensor:
    return mlstm(*tensors, mode="chunk")[0]


def mlstm_quadratic(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """The parallel form of the paper: all pairs of tokens at once."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    i, total = i.transpose(1, 2), F.logsigmoid(f).transpose(1, 2).cumsum(-1)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    log_weight = (total.unsqueeze(-1) - total.unsqueeze(-2) + i.unsqueeze(-2)).masked_fill(later, -torch.inf)
    # The carried state is zero with stabiliser 0, which a row of weights must not fall below.
    m = torch.maximum(log_weight.amax(-1), total)
    weight = q @ k.mT * q.shape[-1] ** -0.5 * (log_weight - m.unsqueeze(-1)).exp()
    bottom = torch.maximum(weight.sum(-1).abs(), (-m).exp()) + 1e-6
    out: Tensor = weight @ v / bottom.unsqueeze(-1)
    return out.transpose(1, 2)


def mlstm_step(function: Function, batch: int, tokens: int, heads: int, width: int, backward: bool, compiled: bool = False) -> Step:
    torch.manual_seed(0)
    sizes = [(batch, tokens, heads, width)] * 3 + [(batch, tokens, heads)] * 2
    leaves = [torch.randn(s, requires_grad=True) for s in sizes]
    leaves[4] = (leaves[4].detach() + 3.0).requires_grad_()
    return timed(torch.compile(function) if compiled else function, leaves, backward)


def mlstm_case(batch: int, tokens: int, heads: int, width: int, backward: bool) -> Case:
    arguments = (batch, tokens, heads, width, backward)
    work = batch * tokens * heads * (2 * width * width + 16 * 2 * width)  # multiply-adds forward: memory, and half a chunk of 32
    return Case(
        f"mLSTM {batch} x {tokens}, {heads} heads of {width}, forward{' + backward' if backward else ''}",
        {
            "phyla": partial(mlstm_step, mlstm_native, *arguments),
            "parallel form": partial(mlstm_step, mlstm_quadratic, *arguments),
            "own torch path": partial(mlstm_step, mlstm_plain, *arguments),
        }
        | ({"own torch path, compiled": partial(mlstm_step, mlstm_plain, *arguments, compiled=True)} if tokens <= 512 else {}),
        flops=2.0 * work * (3.5 if backward else 1.0),
    )


SIZE = 256
LAYERS: dict[str, Callable[[], Recurrent]] = {
    "DeltaProduct": partial(DeltaProduct, SIZE),
    "DeltaNet": partial(DeltaNet, SIZE),
    "GatedDeltaNet": partial(GatedDeltaNet, SIZE),
    "KimiDeltaAttention": partial(KimiDeltaAttention, SIZE),
    "GatedLinearAttention": partial(GatedLinearAttention, SIZE),
    "Mamba2": partial(Mamba2, SIZE, state_size=64),
    "RWKV7": partial(RWKV7, SIZE),
    "MLSTM": partial(MLSTM, SIZE),
}


def torch_paths() -> AbstractContextManager[object]:
    """All kernels replaced by their torch paths."""
    return mock.patch.object(Kernel, "__call__", Kernel.plain)


def training(name: str, native: bool) -> Step:
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(2, 1024, SIZE)

    def step() -> object:
        with nullcontext() if native else torch_paths():
            return torch.autograd.grad(layer(x)[0].square().mean(), list(layer.parameters()))

    return step


def decoding(name: str, native: bool) -> Step:
    torch.manual_seed(0)
    layer, x = LAYERS[name]().eval(), torch.randn(8, SIZE)
    with torch.no_grad():
        _, state = layer(torch.randn(8, 32, SIZE))

    def step() -> object:
        with torch.no_grad(), nullcontext() if native else torch_paths():
            return layer.step(x, state)

    return step


CASES = [
    *(conv_case(2, 2048, 1024, backward) for backward in (False, True)),
    *(mlstm_case(2, tokens, 4, 64, backward) for tokens in (512, 2048) for backward in (False, True)),
    *(
        Case(f"{name}, {what}", {"phyla": partial(step, name, True), "torch paths": partial(step, name, False)})
        for what, step in (("training step of 2 x 1024 x 256", training), ("one token of 8 x 256", decoding))
        for name in LAYERS
    ),
]

if __name__ == "__main__":
    main(CASES)
