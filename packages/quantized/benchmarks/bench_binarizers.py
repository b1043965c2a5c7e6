"""Signs with surrogate derivatives, forward + backward, against the chains of torch ops that other libraries run, eager and compiled.

Run: python benchmarks/bench_binarizers.py [--threads 1] [--only sign_ste]

`saved` in a title is what each keeps alive for the backward pass, bytes an element, measured with hooks on saved tensors.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyla.quantized import ApproxSign, BinaryConv2d, SignSTE
from phyla.quantized import functional as QF
from phyla.shared.bench import Case, main

Sign = Callable[[Tensor], Tensor]
SHAPE = (32, 128, 32, 32)


def ste_chain(x: Tensor) -> Tensor:
    """Clamp, sign, zeros mended, and the difference detached."""
    clipped = x.clamp(-1, 1)
    sign = torch.sign(clipped)
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return clipped + (sign - clipped).detach()


def approx_chain(x: Tensor) -> Tensor:
    """The three masks of the published piecewise polynomial."""
    below, negative, inside = (x < -1).to(x), (x < 0).to(x), (x < 1).to(x)
    first = -below + (x * x + 2 * x) * (1 - below)
    second = first * negative + (2 * x - x * x) * (1 - negative)
    third = second * inside + (1 - inside)
    return torch.sign(x).detach() - third.detach() + third


def biper_chain(x: Tensor) -> Tensor:
    """Sine, its sign, and the difference detached."""
    sine = torch.sin(20.0 * x)
    return sine + (torch.sign(sine) - sine).detach()


def normalized_chain(x: Tensor) -> Tensor:
    """The published order of a layer's input: a division by the standard deviation of the sample, then the sign."""
    return approx_chain(x / torch.sqrt(x.var([1, 2, 3], keepdim=True) + 1e-5))


class Chain(nn.Module):
    """A binary 3 x 3 convolution as chains of torch ops."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) / (3 * channels**0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(ste_chain(x), ste_chain(self.weight), padding=1)


def stack(kind: str, depth: int = 6, channels: int = 64, size: int = 32, batch: int = 16) -> Callable[[], object]:
    """A training step of binary convolutions, each behind a BatchNorm."""
    torch.manual_seed(0)

    def layer() -> nn.Module:
        if kind == "chain":
            return Chain(channels)
        return BinaryConv2d(channels, channels, 3, padding=1, input_binarizer=SignSTE(), scale="none", save_bits=kind == "bits")

    model = nn.Sequential(*(part for _ in range(depth) for part in (layer(), nn.BatchNorm2d(channels))))
    x = torch.randn(batch, channels, size, size)

    def run() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return run


def step(function: Sign, shape: tuple[int, ...], compiled: bool = False) -> Callable[[], object]:
    torch.manual_seed(0)
    run = torch.compile(function) if compiled else function
    x, grad = torch.randn(shape).requires_grad_(), torch.randn(shape)
    return lambda: torch.autograd.grad(run(x), x, grad)


def saved(function: Sign) -> float:
    """Bytes an element that autograd keeps, each storage once."""
    x = torch.randn(4, 16, 32, 32).requires_grad_()
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(x)
    return sum(kept.values()) / x.numel()


def case(name: str, ours: Sign, chain: Sign, least: float, shape: tuple[int, ...] = SHAPE) -> Case:
    return Case(
        f"{name}, {' x '.join(map(str, shape))}, forward + backward; saved {saved(ours):.3g} against {saved(chain):.3g}",
        {
            "phyla": partial(step, ours, shape),
            "chain, compiled": partial(step, chain, shape, compiled=True),
            "chain, eager": partial(step, chain, shape),
        },
        bytes=least * torch.Size(shape).numel(),
        target=1.5,
    )


CASES = [
    Case(
        "six binary convolutions of 64 channels with BatchNorm, 16 x 32 x 32, training step",
        {"phyla, save_bits": partial(stack, "bits"), "phyla": partial(stack, "plain"), "chain, eager": partial(stack, "chain")},
        flops=6 * 3 * 2.0 * 16 * 1024 * 9 * 64 * 64,
    ),
    case("approx_sign of normalized samples", ApproxSign().normalized, normalized_chain, 20.0),
    case("sign_ste", QF.sign_ste, ste_chain, 16.25),  # x, y, grad, dx; the mask twice
    case("approx_sign", QF.approx_sign, approx_chain, 20.0),  # x twice, y, grad, dx
    case("swish_sign", QF.swish_sign, partial(QF.binarizers._surrogate_composite, surrogate="swish", curve=torch.tensor([5.0, 1.0])), 20.0),
    case("biper", partial(QF.biper, frequency=20.0), biper_chain, 20.0, (512, 512, 3, 3)),
]

if __name__ == "__main__":
    main(CASES)
