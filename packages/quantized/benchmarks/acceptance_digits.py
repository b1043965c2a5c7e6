"""Digits: how near do one-bit networks of each kind come to the float one, and what does the frequency of BiPer do?

scikit-learn's digits, 8 x 8 pixels scaled to [-1, 1], 1297 for training and 500 for testing, another split for every seed. The network:
convolution 1 -> 16, binary convolutions 16 -> 16 and 16 -> 32, each with a pooling, and a linear layer; batch normalisation and Hardtanh
behind each convolution. Batches of 64, SGD with momentum 0.9, a cosine without warm-up, all twelve epochs and their last weights:

    float, sign, ReCU, IR-Net   12 epochs, rate 0.05, weight decay 5e-4
    BiPer                       8 epochs of stage 1 (rate 0.021, decay 1.6e-3, penalty 0.037),
                                4 epochs of stage 2 (rate 0.0037, decay 1.6e-4, penalty 0.0468)

Bounds are on the mean over the seeds.

Run: python benchmarks/acceptance_digits.py [--only TEXT] [--seeds 2 3 4]. It exits with an error where a bound is missed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from phyla.quantized import ApproxSign, BinaryConv2d, BiPer, EDESign, IRNet, ReCU, SignSTE, Stage, TwoStage, set_stage

Convolution = Callable[[int, int], nn.Module]
BATCH = 64
ONE = (Stage(12, 0.05, 5e-4, batch_size=BATCH, warmup=0),)
TWO = (
    Stage(8, 0.021, 1.6e-3, penalty=0.037, batch_size=BATCH, warmup=0),
    Stage(4, 0.0037, 1.6e-4, penalty=0.0468, batch_size=BATCH, warmup=0),
)


def plain(inputs: int, outputs: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return conv


def sign(inputs: int, outputs: int) -> nn.Module:
    return BinaryConv2d(inputs, outputs, 3, padding=1, weight_binarizer=SignSTE(), input_binarizer=SignSTE())


def approx_sign(inputs: int, outputs: int) -> nn.Module:
    return BinaryConv2d(inputs, outputs, 3, padding=1, weight_binarizer=SignSTE(), input_binarizer=ApproxSign())


def recu(inputs: int, outputs: int) -> nn.Module:
    return BinaryConv2d(inputs, outputs, 3, padding=1, weight_binarizer=ReCU(), normalize_input=True)


def irnet(inputs: int, outputs: int) -> nn.Module:
    return BinaryConv2d(inputs, outputs, 3, padding=1, weight_binarizer=IRNet(), input_binarizer=EDESign(), scale="none")


def biper(inputs: int, outputs: int, frequency: float = 20.0) -> nn.Module:
    return BinaryConv2d(inputs, outputs, 3, padding=1, weight_binarizer=BiPer(frequency), normalize_input=True)


FREQUENCIES: dict[int, Convolution] = {frequency: partial(biper, frequency=frequency) for frequency in (5, 20, 60)}


def network(convolution: Convolution) -> nn.Sequential:
    return nn.Sequential(
        *(plain(1, 16), nn.BatchNorm2d(16), nn.Hardtanh()),
        *(convolution(16, 16), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.Hardtanh()),
        *(convolution(16, 32), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.Hardtanh()),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)),
    )


@cache
def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training, then for testing."""
    data = load_digits()
    x, y = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1, torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:1297]], y[order[:1297]], x[order[1297:]], y[order[1297:]]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model.eval()(x).argmax(1) == y).double().mean().item()


@dataclass(frozen=True)
class Trained:
    """A network and its test accuracies; those of stage 1, and of its weights' signs, only where there is one."""

    model: nn.Module
    accuracy: float
    stage1: float
    switched: float


@cache
def trained(convolution: Convolution, stages: tuple[Stage, ...], seed: int) -> Trained:
    torch.manual_seed(seed)
    model = network(convolution)
    x, y, *test = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    middle = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            yield x[rows], y[rows]

    def after_epoch(stage: int, epoch: int, loss: float) -> None:
        if stage == 1 and epoch == stages[0].epochs - 1:
            middle.append(accuracy(model, *test))
            set_stage(model, 2)
            middle.append(accuracy(model, *test))

    TwoStage(model, stages).run(batches, callback=after_epoch)
    return Trained(model, accuracy(model, *test), *middle)


Row = tuple[str, list[float], float, str, bool]
"""What was measured, one figure a seed, the mean of the plain reference, the bound, and whether it is met."""


def level_row(name: str, found: list[float], reference: float, least: float | None) -> Row:
    mean = statistics.fmean(found)
    return name, found, reference, "" if least is None else f">= {least}", least is None or mean >= least


def one_stage(name: str, convolution: Convolution, reference: float, least: float | None, seeds: Sequence[int]) -> Iterator[Row]:
    yield level_row(name, [trained(convolution, ONE, seed).accuracy for seed in seeds], reference, least)


def two_stage(seeds: Sequence[int]) -> Iterator[Row]:
    runs = [trained(FREQUENCIES[20], TWO, seed) for seed in seeds]
    final, plain_sign = [run.accuracy for run in runs], [trained(sign, ONE, seed).accuracy for seed in seeds]
    yield level_row("BiPer, stage 1", [run.stage1 for run in runs], 0.972, 0.955)
    yield level_row("BiPer, stage 2", final, 0.966, 0.945)
    gain = [a - b for a, b in zip(final, plain_sign, strict=True)]
    yield "BiPer, stage 2, above sign-STE", gain, 0.022, "> 0", statistics.fmean(gain) > 0


REFERENCE = {5: (0.96, 0.71, 0.93), 20: (0.97, 0.94, 0.96), 60: (0.976, 0.966, 0.978)}


def ablation(seeds: Sequence[int]) -> Iterator[Row]:
    before: int | None = None
    drops, finals = {}, {}
    for frequency, convolution in FREQUENCIES.items():
        runs = [trained(convolution, TWO, seed) for seed in seeds]
        stage1, switched, final = ([getattr(run, name) for run in runs] for name in ("stage1", "switched", "accuracy"))
        drop = [a - b for a, b in zip(stage1, switched, strict=True)]
        drops[frequency], finals[frequency] = statistics.fmean(drop), statistics.fmean(final)
        references = REFERENCE[frequency]
        yield level_row(f"frequency {frequency}, stage 1", stage1, references[0], None)
        yield level_row(f"frequency {frequency}, right after the switch", switched, references[1], None)
        smaller = before is None or drops[frequency] < drops[before]
        bound = "" if before is None else f"< at {before}"
        yield f"frequency {frequency}, drop at the switch", drop, references[0] - references[1], bound, smaller
        better = frequency != 60 or finals[60] > finals[5]
        yield f"frequency {frequency}, after stage 2", final, references[2], "> at 5" if frequency == 60 else "", better
        before = frequency


EXPERIMENTS: dict[str, Callable[[Sequence[int]], Iterator[Row]]] = {
    "float": partial(one_stage, "float", plain, 0.991, 0.98),
    "sign-STE": partial(one_stage, "sign-STE", sign, 0.944, None),
    "ApproxSign": partial(one_stage, "sign, ApproxSign activations", approx_sign, 0.941, None),
    "ReCU": partial(one_stage, "ReCU", recu, 0.979, 0.955),
    "IR-Net": partial(one_stage, "IR-Net", irnet, 0.974, 0.955),
    "BiPer": two_stage,
    "frequency": ablation,
}


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", default="", help=f"experiments whose name holds this text, of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are too small for more
    table = Table(title=f"Test accuracy on digits, seeds {', '.join(map(str, args.seeds))}", title_justify="left")
    for heading in ("", "mean", "each seed", "reference", "bound", "", "seconds"):
        table.add_column(heading, justify="left" if heading in ("", "each seed") else "right")
    missed = []
    for key, experiment in EXPERIMENTS.items():
        if args.only in key:
            start = time.perf_counter()
            for what, found, reference, bound, met in experiment(args.seeds):
                seconds, start = time.perf_counter() - start, time.perf_counter()
                each, verdict = " ".join(f"{value:.3f}" for value in found), "" if not bound else "met" if met else "MISSED"
                table.add_row(what, f"{statistics.fmean(found):.3f}", each, f"{reference:.3f}", bound, verdict, f"{seconds:.1f}")
                missed += [what] * (not met)
    Console(width=120).print(table)
    print("all bounds met" if not missed else "missed: " + "; ".join(missed))
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
