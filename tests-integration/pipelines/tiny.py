"""A pipeline of two seconds: a small KAN beside an MLP on one sine."""

import torch
from torch import nn

from phyla.bench import Board, Context, Measurement, Metric, PipelineResult
from phyla.bench.measure import count_parameters, train
from phyla.bench.sandbox import Progress
from phyla.kan_family import KAN, Chebyshev


def make(name: str) -> nn.Module:
    return KAN([1, 4, 1], basis=Chebyshev(4)) if name == "KAN" else nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))


def error(progress: Progress, name: str, seed: int) -> float:
    torch.manual_seed(seed)
    x, model = torch.linspace(-1, 1, 64)[:, None], make(name)
    y = torch.sin(3 * x)
    train(model, lambda model, batch: (model(batch) - y).square().mean(), [x] * 60, steps=60, rate=0.02)
    progress(1.0)
    with torch.no_grad():
        return float((model(x) - y).square().mean().sqrt())


def run(context: Context) -> PipelineResult:
    seeds = context.seeds(1, 1)
    context.plan(2)
    measurements = []
    for name in ("KAN", "MLP"):
        measured = context.trial(name, error, name, seeds[0])
        parameters = count_parameters(make(name))
        measurements.append(Measurement(name, (measured.value,), parameters, 1.0, measured.peak_mib, baseline=name == "MLP"))
    board = Board("Error", Metric("error", better="lower"), tuple(measurements))
    return PipelineResult("Tiny", "One sine.", seeds, (board,), (), ())
