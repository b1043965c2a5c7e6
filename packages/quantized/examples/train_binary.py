"""BiPer in two stages on scikit-learn's digits: train on sines of the weights, switch to their signs, and go on for a few epochs."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from phyla.quantized import BiPer, RSign, binarize_model, biper_penalty, flip_rate, set_stage


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, lr: float, penalty: float) -> dict[str, float]:
    """Train with SGD; the mean fraction of signs that flip in a step, for each binary layer."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    with flip_rate(model, optimizer) as flips:
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch]) + biper_penalty(model, weight=penalty)
                loss.backward()
                optimizer.step()
            schedule.step()
    return flips.rates.mean()


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    train_x, train_y, test_x, test_y = x[:1297], y[:1297], x[1297:], y[1297:]

    real = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32)),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)),
    )
    model = binarize_model(real, weight_binarizer=BiPer, input_binarizer=lambda: RSign(16), normalize_input=True, save_bits=True)

    flips = train(model, train_x, train_y, epochs=8, lr=0.021, penalty=0.037)
    print(f"stage 1: accuracy {accuracy(model, test_x, test_y):.3f}, flips a step {flips}")
    set_stage(model, 2)
    print(f"after the switch to signs: accuracy {accuracy(model, test_x, test_y):.3f}")
    flips = train(model, train_x, train_y, epochs=4, lr=0.0037, penalty=0.0468)
    print(f"stage 2: accuracy {accuracy(model, test_x, test_y):.3f}, flips a step {flips}")


if __name__ == "__main__":
    main()
