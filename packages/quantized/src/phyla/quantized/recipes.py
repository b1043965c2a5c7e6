"""How the published networks were trained: their hyper-parameters, the learning rate's way, and BiPer's two stages."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.quantized.binarizers import biper_penalty, set_progress, set_stage
from phyla.shared import checks

__all__ = ["BIPER_CIFAR10", "BIPER_IMAGENET", "IRNET_CIFAR10", "RECU_CIFAR10", "Stage", "TwoStage"]

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Stage:
    """Hyper-parameters of one training run with SGD and a cosine learning rate after a linear warm-up.

    Attributes:
        epochs: passes over the data.
        lr: largest learning rate.
        weight_decay: of all parameters.
        penalty: weight of `biper_penalty` in the loss.
        batch_size: samples of a batch.
        momentum: of SGD.
        warmup: epochs e = 0 .. warmup - 1 with the rate lr (e + 1) / warmup; then a cosine to 0 at the end.
    """

    epochs: int
    lr: float
    weight_decay: float
    penalty: float = 0.0
    batch_size: int = 256
    momentum: float = 0.9
    warmup: int = 5

    def rate(self, epoch: int) -> float:
        """The learning rate in epoch 0, 1, ..."""
        if epoch < self.warmup:
            return self.lr * (epoch + 1) / self.warmup
        start = max(self.warmup - 1, 0)
        return self.lr * (1 + math.cos(math.pi * (epoch - start) / (self.epochs - start))) / 2

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD on all parameters of the model."""
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """Sets `rate` on the optimizer; call its `step` after every epoch."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: self.rate(epoch) / self.lr)


BIPER_CIFAR10 = (Stage(600, 0.021, 0.0016, 0.037), Stage(300, 0.0037, 0.00016, 0.0468))
"""The two stages of *BiPer* for ResNet-18 on CIFAR-10, at frequency 20."""

BIPER_IMAGENET = (Stage(200, 0.1, 1e-4, batch_size=512), Stage(100, 0.01, 1e-4, batch_size=512))
"""The two stages of *BiPer* on ImageNet."""

RECU_CIFAR10 = Stage(600, 0.1, 5e-4)
"""*ReCU* on CIFAR-10; tau follows `set_progress`."""

IRNET_CIFAR10 = Stage(600, 0.1, 5e-4)
"""*IR-Net* on CIFAR-10; t follows `set_progress`."""


class TwoStage:
    """Training with real sine weights first, then with their signs from the best network of the first stage.

        recipe = TwoStage(model, BIPER_CIFAR10)
        best = recipe.run(lambda: train_loader, validate=lambda model: accuracy(model, held_out))

    A model without `BiPer` binarizers trains just as well in one stage: `TwoStage(model, (RECU_CIFAR10,))`.

    Args:
        model: is trained in place; every `BiPer` in it is set to stage 1, then 2. Scheduled binarizers follow the progress of each stage.
        stages: one or two.

    Raises: ValueError if there are neither one nor two stages.
    Source: *BiPer*, section 3.3. The published script keeps the best epoch by its test accuracy; here a score on data held out decides.
    """

    def __init__(self, model: nn.Module, stages: tuple[Stage, ...] = BIPER_CIFAR10) -> None:
        if len(stages) not in (1, 2):
            raise ValueError(f"stages: expected one or two, got {len(stages)}")
        self.model = model
        self.stages = tuple(stages)

    def run(
        self,
        batches: Batches,
        *,
        validate: Callable[[nn.Module], float] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        callback: Callable[[int, int, float], None] | None = None,
    ) -> tuple[float, ...]:
        """Train; the model ends with the best weights of the last stage.

        Args:
            batches: gives, for every epoch anew, pairs of inputs and targets.
            validate: scores the model in eval mode after each epoch, more is better; None keeps the last weights of a stage.
            loss: of outputs and targets; the penalty is added to it.
            callback: called after each epoch with stage (1 or 2), epoch and mean training loss.

        Returns: the best score of each stage, NaN without `validate`.
        Raises: ValueError if there are no batches.
        """
        return tuple(self._stage(number, batches, validate, loss, callback) for number in range(1, len(self.stages) + 1))

    def _stage(
        self,
        number: int,
        batches: Batches,
        validate: Callable[[nn.Module], float] | None,
        loss: Callable[[Tensor, Tensor], Tensor],
        callback: Callable[[int, int, float], None] | None,
    ) -> float:
        stage, model = self.stages[number - 1], self.model
        checks.positive_int("epochs", stage.epochs)
        set_stage(model, 1 if number == 1 else 2)
        optimizer = stage.optimizer(model)
        schedule = stage.schedule(optimizer)
        best, weights = math.nan, None
        for epoch in range(stage.epochs):
            set_progress(model, epoch / stage.epochs)
            mean = self._epoch(stage, optimizer, batches(), loss)
            schedule.step()
            if validate is not None:
                model.eval()
                score = validate(model)
                if weights is None or score > best:
                    best, weights = score, copy.deepcopy(model.state_dict())
            if callback is not None:
                callback(number, epoch, mean)
        if weights is not None:
            model.load_state_dict(weights)
        return best

    def _epoch(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        batches: Iterable[tuple[Tensor, Tensor]],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> float:
        """One pass over the data; returns the mean loss."""
        self.model.train()
        losses = []
        for inputs, targets in batches:
            optimizer.zero_grad()
            value = loss(self.model(inputs), targets)
            if stage.penalty:
                value = value + biper_penalty(self.model, weight=stage.penalty)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(value.detach())
        if not losses:
            raise ValueError("batches: expected at least one batch an epoch, got none")
        return float(torch.stack(losses).mean())
