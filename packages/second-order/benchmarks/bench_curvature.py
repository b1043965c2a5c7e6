"""Products with curvature beside curvlinops, the top eigenvalue beside PyHessian (whose density calls functions that torch has removed).

The floor of a product is the arithmetic of the least passes: forward, backward, and for the second derivative as much again.
"""

import itertools
from functools import partial

import curvlinops
import torch
import torch.nn.functional as F
from pyhessian import hessian as pyhessian
from torch import Tensor, nn

from phyla.second_order import GGNOperator, HessianOperator, eigsh, spectral_density
from phyla.shared.bench import Case, Step, main

WIDTH, EXAMPLES, COLUMNS, STEPS, PROBES = 512, 512, 8, 20, 4
SIZES = (256, WIDTH, WIDTH, 10)
PARAMETERS = sum(a * b + b for a, b in itertools.pairwise(SIZES))
FORWARD = 2 * EXAMPLES * sum(a * b for a, b in itertools.pairwise(SIZES))  # FLOPs; a backward pass is two of it


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(SIZES) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]), torch.randn(EXAMPLES, SIZES[0]), torch.randint(SIZES[-1], (EXAMPLES,))


def ours(kind: str, columns: int, cache: bool) -> Step:
    model, x, y = problem()
    make = {"hessian": HessianOperator, "ggn": GGNOperator}[kind]
    operator, block = make(model, F.cross_entropy, (x, y), cache_graph=cache), torch.randn(PARAMETERS, columns)
    return lambda: operator @ block


def linops(kind: str, columns: int) -> Step:
    model, x, y = problem()
    make = {"hessian": curvlinops.HessianLinearOperator, "ggn": curvlinops.GGNLinearOperator}[kind]
    parameters = list(model.parameters())
    operator = make(model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False)
    block = torch.randn(PARAMETERS, columns)
    return lambda: operator @ block


def ours_top() -> Step:
    model, x, y = problem()
    operator = HessianOperator(model, F.cross_entropy, (x, y), cache_graph=True)
    return lambda: eigsh(operator, 1, tol=1e-3)


def py_top() -> Step:
    model, x, y = problem()
    operator = pyhessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    return lambda: operator.eigenvalues(maxIter=100, tol=1e-3)


def ours_density(block: int) -> Step:
    """Probes side by side in blocks of this size."""
    model, x, y = problem()
    operator = HessianOperator(model, F.cross_entropy, (x, y), cache_graph=True)
    return lambda: [spectral_density(operator, num_steps=STEPS, num_probes=block) for _ in range(PROBES // block)]


def products(kind: str, columns: int) -> Case:
    build = {
        "phyla, graph kept": partial(ours, kind, columns, True),
        "curvlinops": partial(linops, kind, columns),
        "phyla": partial(ours, kind, columns, False),
    }
    # Of a kept graph each product costs the tangent pass and the backward pass of both.
    per_product = {"hessian": 6, "ggn": 4}[kind] * FORWARD
    return Case(f"{kind} times {columns} vectors, {PARAMETERS} parameters, {EXAMPLES} examples", build, flops=columns * per_product)


_KRYLOV = 6 * FORWARD * STEPS + 8 * PARAMETERS * STEPS * (STEPS + 1) // 2
CASES = [
    *(products(kind, columns) for kind in ("hessian", "ggn") for columns in (1, COLUMNS)),
    Case("top eigenvalue, tolerance 1e-3", {"phyla": ours_top, "PyHessian": py_top}),
    Case(
        f"spectral density, {STEPS} steps, {PROBES} probes",
        {"phyla": partial(ours_density, PROBES), "phyla, one probe after the other": partial(ours_density, 1)},
        flops=PROBES * _KRYLOV,
    ),
]

if __name__ == "__main__":
    main(CASES)
