"""What the pipelines measure alike: parameters, the time of a step, a training loop, a baseline's size."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from phyla.bench.sandbox import Progress

T = TypeVar("T")


@dataclass
class StepClock:
    """Collects the times of training steps.

    with clock.step():
        ...
    """

    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the body as one step."""
        start = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - start)

    @property
    def median_ms(self) -> float:
        """Median time of a step in milliseconds; not-a-number before the first."""
        return 1e3 * statistics.median(self.seconds) if self.seconds else math.nan


def count_parameters(model: nn.Module) -> int:
    """Return how many trainable numbers `model` has."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, Tensor], Tensor],
    batches: Iterable[Tensor],
    *,
    steps: int,
    rate: float,
    weight_decay: float = 0.0,
    after_step: Callable[[int], None] = lambda step: None,
) -> StepClock:
    """Train with AdamW under a one-cycle schedule (10 % warm-up, cosine decay to 0), gradients clipped at norm 1.

    Args:
        model: is trained in place.
        loss: `loss(model, batch)`, a scalar.
        batches: index tensors, at least `steps` of them.
        steps: optimizer steps.
        rate: peak learning rate.
        weight_decay: decoupled, on matrices only (biases, norms, knots and rational coefficients are not decayed).
        after_step: called with the number of steps done.

    Returns:
        The clock of the steps. Training stops early when the loss is not finite; the caller sees it in the scores.
    """
    shrink = [p for name, p in model.named_parameters() if p.ndim >= 2 and name.rsplit(".", 1)[-1] in ("weight", "coef", "base_weight")]
    chosen = {id(p) for p in shrink}
    keep = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": shrink, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=max(0.1, 2 / steps), cycle_momentum=False)
    clock = StepClock()
    model.train()
    for done, batch in zip(range(1, steps + 1), batches, strict=False):
        with clock.step():
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()
        if not math.isfinite(value.item()):
            break
        after_step(done)
    return clock


def at_the_best_rate(
    loss: Callable[[float, Progress], float],
    final: Callable[[int, float, Progress], T],
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    progress: Progress,
) -> tuple[float, list[T]]:
    """Train once a seed, with the learning rate of the lowest loss if there is a choice.

    Args:
        loss: `loss(rate, progress)` trains with a rate and returns a loss on data that no score sees; the lowest finite one wins.
        final: `final(seed, rate, progress)` trains with the rate that was found.
        rates: learning rates; a single one is taken untried.
        seeds: seeds of the final trainings.
        progress: is told of the whole; `loss` and `final` tell theirs the share of their own training that is done.

    Returns:
        The rate, and what `final` returned for each seed.
    """
    tried = rates if len(rates) > 1 else ()
    total = len(tried) + len(seeds)

    def part(index: int) -> Progress:
        return lambda share: progress((index + share) / total)

    losses = [loss(rate, part(index)) for index, rate in enumerate(tried)]
    ranked = [value if math.isfinite(value) else math.inf for value in losses]
    rate = rates[ranked.index(min(ranked))] if tried else rates[0]
    return rate, [final(seed, rate, part(len(tried) + index)) for index, seed in enumerate(seeds)]


def shuffled(count: int, batch_size: int, *, seed: int) -> Iterator[Tensor]:
    """Yield index tensors forever: epoch after epoch in new order, the incomplete last batch of an epoch left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].view(-1, batch_size)


def nearest_widths(count: Callable[[int, int], int], parameters: int, widths: Sequence[int]) -> tuple[int, int]:
    """Return two hidden widths, neither over twice the other, that come nearest to `parameters`; ties go to the squarest."""
    pairs = [(a, b) for a in widths for b in widths if max(a, b) <= 2 * min(a, b)]
    return min(pairs, key=lambda pair: (abs(count(*pair) - parameters), abs(pair[0] - pair[1]), pair))
