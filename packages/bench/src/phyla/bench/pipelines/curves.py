"""Function fitting and symbolic readout: KANs of four bases beside an MLP of equal size, on formulas with special functions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn

from phyla.bench import Board, Chart, Context, Line, Measurement, Metric, PipelineResult, Table
from phyla.bench.measure import at_the_best_rate, count_parameters, nearest_widths, train
from phyla.bench.sandbox import Progress
from phyla.kan_family import KAN, BSpline, Chebyshev, Fourier, Rational, fit, symbolic_readout

POINTS, VALIDATION, HIDDEN = 512, 128, 6
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
QUICK = ("sin(5 pi x)", "exp(sin(pi x) + y^2)", "J0(20x)")  # the functions of a quick run
DRAWN = "J0(20x)"
READ, STARTS, GRIDS = "exp(sin(pi x) + y^2)", 4, (5, 10, 20)

ABOUT = """
Fitting seven functions on [-1, 1]^n from 512 random points without noise: oscillating, steep, kinked, multiplicative and nested
ones; J0 is scipy's Bessel function. The score is the error on 2,000 fresh points, as root mean square relative to the function's
standard deviation (1 is no better than the mean). On each function all models have the same number of parameters up to 5 % and
equally many full-batch steps of AdamW under one schedule; only the learning rate is each model's own, picked from 0.003, 0.01,
0.03 and 0.1 on 128 of the training points. A quick run takes three of the functions, 300 steps and one fixed rate a model, which
leaves the MLP in particular under-trained: compare models by a full run.

The first three KANs have one hidden layer of 6 nodes and 13 parameters an edge: cubic splines on 9 intervals (their grid follows
the data three times early in training), Chebyshev polynomials of degree 11, 6 Fourier frequencies (inputs scaled by pi, their
natural period). The rational KAN and the MLP (SiLU) have two hidden layers.
"""


FUNCTIONS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "sin(5 pi x)": (1, lambda x: np.sin(5 * np.pi * x[:, 0])),
    "exp(sin(pi x) + y^2)": (2, lambda x: np.exp(np.sin(np.pi * x[:, 0]) + x[:, 1] ** 2)),
    "x y": (2, lambda x: x[:, 0] * x[:, 1]),
    "J0(20x)": (1, lambda x: special.j0(20 * x[:, 0])),
    "tanh(20 (x - 0.2))": (1, lambda x: np.tanh(20 * (x[:, 0] - 0.2))),
    "|x + y|": (2, lambda x: np.abs(x[:, 0] + x[:, 1])),
    "exp((sin(pi (x1^2 + x2^2)) + sin(pi (x3^2 + x4^2))) / 2)": (
        4,
        lambda x: np.exp((np.sin(np.pi * (x[:, 0] ** 2 + x[:, 1] ** 2)) + np.sin(np.pi * (x[:, 2] ** 2 + x[:, 3] ** 2))) / 2),
    ),
}


class Scale(nn.Module):
    """Multiplies its input by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled input."""
        return self.factor * x


def spline(inputs: int) -> nn.Module:
    """The KAN of the KAN paper: 12 functions and the base branch on an edge."""
    return KAN([inputs, HIDDEN, 1], basis=BSpline(9, 3))


def chebyshev(inputs: int) -> nn.Module:
    """Polynomials of degree 11: 12 functions and the base branch on an edge."""
    return KAN([inputs, HIDDEN, 1], basis=Chebyshev(11))


def fourier(inputs: int) -> nn.Module:
    """Six frequencies: 12 functions and the base branch on an edge."""
    return nn.Sequential(Scale(math.pi), KAN([inputs, HIDDEN, 1], basis=Fourier(6)))


def rational(inputs: int) -> nn.Module:
    """Linear maps with a learned rational activation before each; hidden widths for the spline KAN's size."""
    first, second = nearest_widths(lambda a, b: dense_size(inputs, a, b) + 3 * 10, budget(inputs), range(2, 40))
    return KAN([inputs, first, second, 1], basis=Rational(num_groups=1), base=None)


def mlp(inputs: int) -> nn.Module:
    """Two hidden layers with SiLU; hidden widths for the spline KAN's size."""
    first, second = nearest_widths(lambda a, b: dense_size(inputs, a, b), budget(inputs), range(2, 40))
    return nn.Sequential(nn.Linear(inputs, first), nn.SiLU(), nn.Linear(first, second), nn.SiLU(), nn.Linear(second, 1))


def budget(inputs: int) -> int:
    """Return the parameters of the one-hidden-layer KANs: 13 an edge and the biases."""
    return 13 * HIDDEN * (inputs + 1) + HIDDEN + 1


def dense_size(inputs: int, first: int, second: int) -> int:
    """Return the parameters of two hidden layers and one output."""
    return (inputs + 1) * first + (first + 1) * second + second + 1


@dataclass(frozen=True)
class Model:
    """A contestant: how to build it for a number of inputs, and the learning rate of quick runs."""

    name: str
    build: Callable[[int], nn.Module]
    rate: float
    baseline: bool = False


MODELS = (
    Model("spline KAN", spline, 1e-1),
    Model("Chebyshev KAN", chebyshev, 3e-2),
    Model("Fourier KAN", fourier, 3e-2),
    Model("rational KAN", rational, 3e-2),
    Model("MLP", mlp, 1e-1, baseline=True),
)


@dataclass(frozen=True)
class Fitted:
    """What a trial gives back; `drawn` is the first seed's prediction on an even grid, for functions of one variable."""

    rate: float
    errors: tuple[float, ...]
    parameters: int
    step_ms: float
    drawn: tuple[float, ...]


def sample(function: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points and exact values."""
    inputs, formula = FUNCTIONS[function]
    points = np.random.default_rng(seed).uniform(-1, 1, (count, inputs))
    return torch.from_numpy(points).float(), torch.from_numpy(formula(points)).float().unsqueeze(1)


@torch.no_grad()
def relative_error(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Return the root mean square error over the standard deviation of `y`; not-a-number where training diverged."""
    error = (network(x) - y).double().square().mean().sqrt()
    return (error / y.double().std()).item()


def train_curve(progress: Progress, function: str, name: str, seeds: Sequence[int], rates: Sequence[float], steps: int) -> Fitted:
    """Fit one function with one model, once a seed; pick the rate on held-out training points if there is a choice."""
    model = next(each for each in MODELS if each.name == name)
    inputs, _ = FUNCTIONS[function]
    times: list[float] = []

    def once(seed: int, rate: float, x: Tensor, y: Tensor, told: Progress) -> nn.Module:
        torch.manual_seed(seed)
        network = model.build(inputs)
        updates = {steps * share // 100 for share in (2, 5, 10)} if isinstance(network, KAN) and name == "spline KAN" else set()

        def after_step(step: int) -> None:
            if step in updates and isinstance(network, KAN):
                network.update_grid(x)
            if step % 100 == 0:
                told(step / steps)

        clock = train(
            network,
            lambda net, rows: nn.functional.mse_loss(net(x), y),
            repeat(torch.arange(len(x))),
            steps=steps,
            rate=rate,
            after_step=after_step,
        )
        times.extend(clock.seconds)
        return network

    def held_out_error(rate: float, told: Progress) -> float:
        x, y = sample(function, POINTS, seeds[0])
        return relative_error(once(seeds[0], rate, x[VALIDATION:], y[VALIDATION:], told), x[:VALIDATION], y[:VALIDATION])

    rate, networks = at_the_best_rate(
        held_out_error,
        lambda seed, rate, told: once(seed, rate, *sample(function, POINTS, seed), told),
        rates=rates,
        seeds=seeds,
        progress=progress,
    )
    errors = [relative_error(network, *sample(function, 2000, seed + 1_000_003)) for seed, network in zip(seeds, networks, strict=True)]
    drawn: tuple[float, ...] = ()
    if inputs == 1:
        with torch.no_grad():
            drawn = tuple(networks[0](torch.linspace(-1, 1, 401).unsqueeze(1)).flatten().tolist())
    return Fitted(rate, tuple(errors), count_parameters(networks[0]), 1e3 * float(np.median(times)), drawn)


@dataclass(frozen=True)
class Reading:
    """A formula read from a trained KAN, its fit to the network and its error against the truth."""

    formula: str
    r2: float
    network_error: float
    formula_error: float


def read_formula(progress: Progress, seed: int, steps: int) -> Reading:
    """Train a KAN of the function's own shape with L-BFGS on finer and finer grids and read its three edges as formulas.

    A network this narrow has local minima: of several starts the best after the first grid goes on.
    """
    x, y = (each.double() for each in sample(READ, 1000, seed))
    tried = []
    for start in range(STARTS):
        torch.manual_seed(STARTS * seed + start)
        model = KAN([2, 1, 1], basis=BSpline(GRIDS[0], 3), dtype=torch.float64)
        loss = fit(model, x, y, steps=steps, grid_update_until=0).train_loss[-1].item()
        tried.append((loss, start, model))
        progress((start + 1) / (STARTS + len(GRIDS)))
    _, _, model = min(tried)
    for phase, grid in enumerate(GRIDS[1:], 1):
        model.refine(grid)
        fit(model, x, y, steps=steps, grid_update_until=0)
        progress((STARTS + phase) / (STARTS + len(GRIDS)))
    readout = symbolic_readout(model, x)
    fresh, truth = (each.double() for each in sample(READ, 2000, seed + 1_000_003))
    return Reading(readout.formulas[0], readout.r2[0].item(), relative_error(model, fresh, truth), relative_error(readout, fresh, truth))


def run(context: Context) -> PipelineResult:
    """Fit every function with every model, then read a formula from a trained KAN."""
    seeds, steps = context.seeds(2, 5), context.pick(300, 3000)
    functions, read = context.pick(QUICK, tuple(FUNCTIONS)), context.pick(seeds[:1], seeds)
    context.plan(len(functions) * len(MODELS) + len(read))
    measurements, lines = [], []
    grid = np.linspace(-1, 1, 401)
    for function in functions:
        _, formula = FUNCTIONS[function]
        if function == DRAWN:
            lines.append(Line("exact", tuple(grid), tuple(formula(grid[:, None])), baseline=True))
        for model in MODELS:
            rates = context.pick((model.rate,), RATES)
            trial = context.trial(f"{function}: {model.name}", train_curve, function, model.name, seeds, rates, steps)
            found = trial.value
            recipe = f"{steps} steps, rate " + context.pick(f"{found.rate:g}", "picked for each function")
            measurements.append(
                Measurement(model.name, found.errors, found.parameters, found.step_ms, trial.peak_mib, function, model.baseline, recipe)
            )
            if function == DRAWN:
                lines.append(Line(model.name, tuple(grid), found.drawn, model.baseline))
    board = Board("Error at equal size and training", Metric("relative test error", better="lower", scale="log"), tuple(measurements))
    board.require_equal_budget()
    rows = []
    for seed in read:
        reading = context.trial(f"formula, seed {seed}", read_formula, seed, context.pick(10, 20)).value
        rows.append((str(seed), reading.formula, f"{reading.r2:.6f}", f"{reading.network_error:.1e}", f"{reading.formula_error:.1e}"))
    header = ("seed", "formula", "R2 to the network", "network's error", "formula's error")
    table = Table(f"Formulas read from KAN([2, 1, 1]) trained on {READ} (x1 is x, x2 is y)", header, tuple(rows))
    chart = Chart(f"Fits of {DRAWN}, first seed", "x", DRAWN, tuple(lines))
    return PipelineResult("Curves: function fitting and symbolic readout", ABOUT, seeds, (board,), (chart,), (table,))
