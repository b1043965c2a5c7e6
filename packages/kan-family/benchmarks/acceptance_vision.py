"""Small vision transformers on scikit-learn's digits: group-rational KAN against the MLP, learnable attention against softmax.

Run: python benchmarks/acceptance_vision.py [--seeds 3] [--only TEXT]. It exits with an error where a bound is missed.
"""

import argparse
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from phyla.kan_family.bases import Fourier
from phyla.kan_family.vision import VisionTransformer

EPOCHS, BATCH, TRAIN = 15, 64, 1297
MODELS: dict[str, dict[str, Any]] = {
    "mlp, softmax": {"mlp": "mlp", "attention": "softmax"},
    "grkan, softmax": {"mlp": "grkan", "attention": "softmax"},
    "mlp, kan-blockwise": {"mlp": "mlp", "attention": "kan-blockwise", "basis": Fourier(3), "rank": 8},
    "mlp, kan-universal": {"mlp": "mlp", "attention": "kan-universal", "basis": Fourier(3), "rank": 8},
}


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images `(n, 1, 8, 8)` in [-1, 1] and labels, for training and for testing."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:TRAIN]], y[order[:TRAIN]], x[order[TRAIN:]], y[order[TRAIN:]]


def accuracy(seed: int, options: dict[str, Any]) -> float:
    """Test accuracy in percent after training; the recipe is the same for every model."""
    x, y, x_test, y_test = digits(seed)
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=2, in_channels=1, num_classes=10, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2.0, **options
    )
    skipped = model.no_weight_decay()
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in skipped], "weight_decay": 0.05},
        {"params": [p for n, p in model.named_parameters() if n in skipped], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    steps = EPOCHS * -(-TRAIN // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAIN).split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return 100.0 * float((model(x_test).argmax(1) == y_test).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ..")
    parser.add_argument("--only", default="", help="models whose name holds this text")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are too small for more
    mean = {}
    for name, options in MODELS.items():
        if args.only in name:
            start = time.perf_counter()
            scores = [accuracy(seed, options) for seed in range(args.seeds)]
            mean[name] = sum(scores) / len(scores)
            runs = ", ".join(f"{s:.1f}" for s in scores)
            print(f"{name:20s} {mean[name]:6.2f} % ({runs}) in {time.perf_counter() - start:.0f} s", flush=True)
    if len(mean) < len(MODELS):
        return
    base = mean["mlp, softmax"]
    bounds = {
        "grkan, softmax": max(90.0, base - 2.5),
        "mlp, kan-blockwise": max(96.0, base + 1.5),
        "mlp, kan-universal": base + 1.0,
    }
    missed = [f"{name}: {mean[name]:.2f} % < {bound:.2f} %" for name, bound in bounds.items() if mean[name] < bound]
    print("all bounds met" if not missed else "missed: " + "; ".join(missed))
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
