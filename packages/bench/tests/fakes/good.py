"""A pipeline that works: two models, two seeds, trials in fresh processes."""

import torch

from phyla.bench import Board, Chart, Context, Line, Measurement, Metric, PipelineResult, Table
from phyla.bench.sandbox import Progress


def draw(progress: Progress, model: str, seeds: tuple[int, ...]) -> tuple[float, ...]:
    held = torch.ones(2**22)  # 16 MiB
    progress(0.5)
    shift = 1.0 if model == "new <model>" else 0.0
    return tuple(float(torch.rand(1, generator=torch.Generator().manual_seed(seed))) + shift + 0 * float(held[0]) for seed in seeds)


def run(context: Context) -> PipelineResult:
    seeds = context.seeds(2, 3)
    context.plan(2)
    measurements = []
    for model in ("new <model>", "old & plain"):
        measured = context.trial(model, draw, model, seeds)
        measurements.append(
            Measurement(model, measured.value, parameters=1000, step_ms=1.5, peak_mib=measured.peak_mib, baseline=model == "old & plain")
        )
    board = Board("Accuracy", Metric("test accuracy", "%"), tuple(measurements))
    many = tuple(
        Measurement(model, (10.0**-power, 2 * 10.0**-power), 10 * power, 0.5, None, task=f"task {power}", baseline=model == "b")
        for power in (1, 2, 3)
        for model in ("a", "b")
    )
    errors = Board("Errors", Metric("error", better="lower", scale="log"), many)
    chart = Chart(
        "Curve", "step", "loss", (Line("a", (0.0, 1.0), (1.0, 0.1)), Line("b", (0.0, 1.0), (1.0, 0.5), baseline=True)), log_y=True
    )
    table = Table("Formulas", ("seed", "formula"), (("0", "x < 1 & y"),))
    return PipelineResult("A good pipeline", "First paragraph.\n\nSecond paragraph.", seeds, (board, errors), (chart,), (table,))
