"""Group-rational activation against the published torch path, the plain formula, torch.compile and SiLU.

Run: python benchmarks/bench_rational.py [--threads 2]
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from phyla.kan_family.functional.rational import _rational, rational
from phyla.kan_family.rational import GroupRational
from phyla.shared.bench import Case, main

Activation = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], object]


def published(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """The formula of the released layer's torch path: a copy for each group, stacked powers, two batched products.

    With |x| in the denominator; the released path has signed powers there, which is wrong for negative x.
    """
    B, N, D = x.shape
    groups, m, n = denominator.shape[0], numerator.shape[1] - 1, denominator.shape[1]
    z = x.view(B, N, groups, D // groups).permute(2, 0, 1, 3).contiguous().view(groups, -1)
    powers = torch.stack([z**i for i in range(m + 1)], dim=2)
    p = torch.bmm(powers, numerator.expand(groups, -1).unsqueeze(2)).squeeze(2)
    q = 1 + torch.bmm(powers[..., 1 : n + 1].abs(), denominator.abs().unsqueeze(2)).squeeze(2)
    return (p / q).view(groups, B, N, D // groups).permute(1, 2, 0, 3).contiguous().view(B, N, D)


def formula(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """The package's own composite, run eagerly."""
    y: Tensor = _rational.plain(x, numerator, denominator, "sum_abs", -1)
    return y


def silu(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """What a fixed activation costs in its place."""
    return F.silu(x)


def step(act: Activation, shape: tuple[int, ...], backward: bool, compiled: bool = False) -> Step:
    torch.manual_seed(0)
    run = torch.compile(act) if compiled else act
    layer = GroupRational()
    x, grad = torch.randn(shape).requires_grad_(), torch.randn(shape)
    leaves = (x, layer.numerator, layer.denominator)

    def forward_only() -> object:
        with torch.no_grad():
            return run(*leaves)

    def both() -> object:
        return torch.autograd.grad(run(*leaves), leaves, grad, allow_unused=True)

    return both if backward else forward_only


def case(shape: tuple[int, ...], backward: bool, peer: str, act: Activation, target: float) -> Case:
    name = f"{' x '.join(map(str, shape))}, forward{' + backward' if backward else ''}"
    elements = torch.Size(shape).numel()
    build = {
        "phyla": partial(step, rational, shape, backward),
        peer: partial(step, act, shape, backward),
        "silu": partial(step, silu, shape, backward),
        "formula, compiled": partial(step, formula, shape, backward, compiled=True),
    }
    return Case(
        f"group rational, {name}",
        build,
        flops=elements * (65.0 if backward else 20.0),
        bytes=elements * (20.0 if backward else 8.0),  # x, y; and grad, x, dx
        target=target,
    )


CASES = [
    case((8, 197, 768), False, "published torch path", published, 8.0),
    case((8, 197, 768), True, "published torch path", published, 6.0),
    case((4096, 768), True, "formula, eager", formula, 20.0),
]

if __name__ == "__main__":
    main(CASES)
