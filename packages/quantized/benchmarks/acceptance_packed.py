"""Packed networks: are their outputs those of the float graph, bit for bit, and how small are they?

    wild      VGG-small of width 32, ResNet-20 and ResNet-18 with random statistics, slopes and factors of both signs, and zero padding
    trained   the network of acceptance_digits.py by each binarizer, on the 500 test images
    memory    the binary layers of ResNet-18 for CIFAR, and its file

Each network is packed with and without folding, saved and loaded again; all four must give `torch.equal` outputs.

Run: python benchmarks/acceptance_packed.py [--seeds 0 1]. It exits with an error where a bound is missed.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from acceptance_digits import FREQUENCIES, ONE, TWO, approx_sign, digits, irnet, recu, sign, trained
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from phyla.quantized import BiPer, load_packed, pack, resnet18, resnet20, save_packed, set_stage, vgg_small
from phyla.quantized.layers import BinaryLayer

Row = tuple[str, str, str, bool]
"""What was measured, the figure, the bound, and whether it is met."""

WILD: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "VGG-small, width 32": (lambda: vgg_small(width=32), 8),
    "ResNet-20": (resnet20, 8),
    "ResNet-18": (resnet18, 2),
}
TRAINED = {
    "sign-STE": (sign, ONE),
    "sign, ApproxSign activations": (approx_sign, ONE),
    "ReCU": (recu, ONE),
    "IR-Net": (irnet, ONE),
    **{f"BiPer, frequency {frequency}": (convolution, TWO) for frequency, convolution in FREQUENCIES.items()},
}


@torch.no_grad()
def scramble(model: nn.Module, seed: int) -> nn.Module:
    """The model with statistics that no training would give, and binary weights."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (module.running_mean, module.weight, module.bias):
                values.normal_()
            module.running_var.uniform_(0.1, 10)
        elif isinstance(module, BinaryLayer):
            module.scale.normal_()
    set_stage(model, 2)
    return model.eval()


@torch.no_grad()
def equal_row(name: str, model: nn.Module, x: Tensor) -> Row:
    """Packed with and without folding, before and after a file."""
    wanted = model.eval()(x)
    right = 0
    for fold in (True, False):
        packed = pack(model, fold=fold)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            save_packed(packed, file)
            loaded = load_packed(model, file)
        right += sum(torch.equal(each(x), wanted) for each in (packed, loaded))
    return name, f"{right} of 4 equal on {len(x)} images", "4 of 4", right == 4


def wild_rows(seeds: Sequence[int]) -> Iterator[Row]:
    for name, (build, count) in WILD.items():
        for seed in seeds:
            model = scramble(build(), seed)
            yield equal_row(f"wild, {name}, seed {seed}", model, torch.randn(count, 3, 32, 32))


def trained_rows(seeds: Sequence[int]) -> Iterator[Row]:
    for name, (convolution, stages) in TRAINED.items():
        for seed in seeds:
            yield equal_row(f"trained, {name}, seed {seed}", trained(convolution, stages, seed).model, digits(seed)[2])


def memory_rows() -> Iterator[Row]:
    model = resnet18(weight_binarizer=lambda: BiPer(stage=2))
    packed = pack(model)
    layers = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, BinaryLayer)}
    before = {name: weight.nbytes for name, weight in layers.items()}
    after = {name: packed.get_submodule(name).weight_packed.nbytes for name in layers}
    ratios = [before[name] / after[name] for name in layers]
    met = min(ratios) >= 31.5 and max(ratios) <= 32
    yield "ResNet-18, weights of a binary layer", f"{min(ratios):.2f} to {max(ratios):.2f} times smaller", "31.5 to 32", met
    sums = sum(before.values()) / 1e6, sum(after.values()) / 1e6
    yield "ResNet-18, all binary layers", f"{sums[0]:.2f} MB -> {sums[1]:.2f} MB", "44 -> 1.4 MB", sums[0] > 43 and sums[1] <= 1.45
    with tempfile.TemporaryDirectory() as folder:
        float_file, packed_file = Path(folder) / "float.pt", Path(folder) / "packed.safetensors"
        torch.save(model.state_dict(), float_file)
        save_packed(packed, packed_file)
        sizes = float_file.stat().st_size / 1e6, packed_file.stat().st_size / 1e6
    yield "ResNet-18, file of the whole network", f"{sizes[0]:.2f} MB -> {sizes[1]:.2f} MB", "", True


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="Packed networks", title_justify="left")
    for heading in ("", "figure", "bound", "verdict"):
        table.add_column(heading)
    missed = []
    for rows in (wild_rows(args.seeds), trained_rows(args.seeds), memory_rows()):
        for what, figure, bound, met in rows:
            table.add_row(what, figure, bound, "" if not bound else "met" if met else "MISSED")
            missed += [what] * (not met)
    Console(width=120).print(table)
    print("all bounds met" if not missed else "missed: " + "; ".join(missed))
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
