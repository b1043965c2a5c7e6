"""Train a small binary network on digits, run it on bits, write it to a file and read it back: the same answers in fewer bytes."""

import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from phyla.quantized import BinaryConv2d, BiPer, Stage, TwoStage, load_packed, pack, save_packed, summarize


def network() -> nn.Sequential:
    def binary(inputs: int, outputs: int) -> BinaryConv2d:
        return BinaryConv2d(inputs, outputs, 3, padding=1, weight_binarizer=BiPer(), normalize_input=True)

    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Hardtanh()),
        *(binary(32, 32), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.Hardtanh()),
        *(binary(32, 64), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.Hardtanh()),
        *(nn.Flatten(), nn.Linear(64 * 4, 10)),
    )


def milliseconds(model: nn.Module, x: Tensor, repeats: int = 5) -> float:
    times = []
    with torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[repeats // 2]


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, held_out, test = order[:1100], order[1100:1297], order[1297:]


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(images[part], labels[part]) for part in train[torch.randperm(len(train))].split(64)]


def accuracy(model: nn.Module, part: Tensor) -> float:
    with torch.no_grad():
        return float((model(images[part]).argmax(1) == labels[part]).double().mean())


model = network()
stages = (Stage(4, 0.021, 1.6e-3, 0.037, warmup=0), Stage(2, 0.0037, 1.6e-4, 0.0468, warmup=0))
TwoStage(model, stages).run(batches, validate=lambda m: accuracy(m, held_out))
model.eval()

packed = pack(model)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.safetensors"
    save_packed(packed, path)
    loaded = load_packed(network(), path)
    size = path.stat().st_size

with torch.no_grad():
    assert torch.equal(loaded(images[test]), model(images[test]))
print(summarize(model, (1, 1, 8, 8)))
print(f"\naccuracy {accuracy(model, test):.3f}, packed and loaded {accuracy(loaded, test):.3f}: the same outputs, bit for bit")
print(f"file {size / 1024:.1f} KiB; float32 parameters {4 * sum(p.numel() for p in model.parameters()) / 1024:.1f} KiB")
print(f"500 images: float {milliseconds(model, images[test]):.1f} ms, packed {milliseconds(packed, images[test]):.1f} ms")
