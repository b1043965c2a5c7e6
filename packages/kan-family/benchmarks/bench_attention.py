"""Fourier attention against the equations written out, the composite (eager and compiled) and softmax attention.

Run: python benchmarks/bench_attention.py [--threads 2]
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from phyla.kan_family.bases import Fourier
from phyla.kan_family.functional.attention import _fourier_hidden, learned_attention
from phyla.shared.bench import Case, main

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], object]


def ours(q: Tensor, k: Tensor, v: Tensor, coef: Tensor, proj: Tensor) -> Tensor:
    """The native kernel."""
    return learned_attention(q, k, v, coef, proj, basis=Fourier(coef.shape[3] // 2).build(k.shape[2]))


def equations(q: Tensor, k: Tensor, v: Tensor, coef: Tensor, proj: Tensor) -> Tensor:
    """The paper's equations as they stand: all basis values, then the weights, then the values."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    angles = scores[..., None] * torch.arange(1, coef.shape[3] // 2 + 1)
    hidden = torch.einsum("bhnqk,hrqk->bhnr", torch.cat([angles.cos(), angles.sin()], -1), coef)
    return hidden @ proj.mT @ v


def composite(q: Tensor, k: Tensor, v: Tensor, coef: Tensor, proj: Tensor) -> Tensor:
    """The kernel's own plain torch."""
    hidden: Tensor = _fourier_hidden.plain(q, k, coef, None, "none", q.shape[-1] ** -0.5)
    return hidden @ (proj.mT @ v)


def softmax(q: Tensor, k: Tensor, v: Tensor, coef: Tensor, proj: Tensor) -> Tensor:
    """What softmax attention costs in its place."""
    return F.scaled_dot_product_attention(q, k, v)


def step(attend: Attention, sizes: tuple[int, ...], backward: bool, compiled: bool = False) -> Step:
    torch.manual_seed(0)
    batch, heads, tokens, width, rank, frequencies = sizes
    run = torch.compile(attend) if compiled else attend
    q, k, v = (torch.randn(batch, heads, tokens, width, requires_grad=True) for _ in range(3))
    coef = (torch.randn(heads, rank, tokens, 2 * frequencies) * (tokens * frequencies) ** -0.5).requires_grad_()
    proj = (torch.randn(heads, tokens, rank) * (tokens * rank) ** -0.5).requires_grad_()
    leaves, grad = (q, k, v, coef, proj), torch.randn(batch, heads, tokens, width)

    def forward_only() -> object:
        with torch.no_grad():
            return run(*leaves)

    def both() -> object:
        return torch.autograd.grad(run(*leaves), leaves, grad, allow_unused=True)

    return both if backward else forward_only


def case(sizes: tuple[int, ...], backward: bool, target: float | None) -> Case:
    batch, heads, tokens, width, rank, frequencies = sizes
    scores, contraction = 2 * tokens**2 * width, 4 * tokens**2 * rank * frequencies
    name = "B {}, h {}, N {}, d {}, r {}, G {}".format(*sizes) + f", forward{' + backward' if backward else ''}"
    build = {
        "phyla": partial(step, ours, sizes, backward),
        "equations": partial(step, equations, sizes, backward),
        "composite": partial(step, composite, sizes, backward),
        "composite, compiled": partial(step, composite, sizes, backward, compiled=True),
        "softmax": partial(step, softmax, sizes, backward),
    }
    elements = batch * heads * tokens * width
    return Case(
        name,
        build,
        flops=batch * heads * ((4 * scores + 3 * contraction) if backward else scores + contraction),
        bytes=4 * elements * (8 if backward else 4),
        target=target,
    )


CASES = [
    case((8, 3, 197, 64, 12, 3), False, None),
    case((8, 3, 197, 64, 12, 3), True, 3.0),
    case((2, 3, 1024, 64, 12, 3), True, None),
]

if __name__ == "__main__":
    main(CASES)
