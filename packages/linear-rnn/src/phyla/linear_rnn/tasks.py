"""Synthetic tasks that ask for state tracking and for recall, and how far a trained model's answers carry beyond its training length.

Every task is a function `task(batch_size, length, *, generator=None, ...) -> TaskBatch`; the same generator state gives the same batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from phyla.shared import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "IGNORED",
    "ExtrapolationResult",
    "TaskBatch",
    "group_elements",
    "group_word_problem",
    "length_extrapolation",
    "modular_addition",
    "modular_arithmetic",
    "mqar",
    "parity",
]

IGNORED = -100
"""The target of a position that is not scored; `torch.nn.functional.cross_entropy` ignores it by default."""

MOST_POINTS = 8  # S8 has 40,320 elements


class TaskBatch(NamedTuple):
    """Inputs and targets, both int64 `(batch_size, length)`; targets are `IGNORED` where nothing is asked."""

    inputs: Tensor
    targets: Tensor


def parity(batch_size: int, length: int, *, generator: Generator | None = None) -> TaskBatch:
    """Bits, and at every position the XOR of all bits so far.

    Args:
        batch_size: sequences.
        length: tokens of a sequence.
        generator: the source of randomness.

    Returns:
        Tokens and targets in {0, 1}, every position scored.

    Raises:
        ValueError, TypeError: if a size is no positive int.
    """
    return modular_addition(batch_size, length, modulus=2, generator=generator)


def modular_addition(batch_size: int, length: int, *, modulus: int = 5, generator: Generator | None = None) -> TaskBatch:
    """Numbers, and at every position the sum of all numbers so far, modulo `modulus`.

    Args:
        batch_size: sequences.
        length: tokens of a sequence.
        modulus: tokens and targets are 0 .. modulus - 1.
        generator: the source of randomness.

    Returns:
        Tokens and targets, every position scored.

    Raises:
        ValueError, TypeError: if a size or the modulus is no positive int.
    """
    size = _size(batch_size, length)
    inputs = torch.randint(checks.positive_int("modulus", modulus), size, generator=generator)
    return TaskBatch(inputs, inputs.cumsum(1) % modulus)


def modular_arithmetic(
    batch_size: int, length: int, *, modulus: int = 5, brackets: bool = False, generator: Generator | None = None
) -> TaskBatch:
    """Expressions such as `3 - 2 * ( 4 + 1 ) =`; the value modulo `modulus` is asked at the `=`, the last token.

    Digits are the tokens 0 .. modulus - 1; then `+`, `-`, `*`, `(`, `)` and `=` follow, modulus + 6 tokens in all. `*` binds tighter than
    `+` and `-`. An expression of binary operators has an odd number of tokens: where `length` asks for an even one it starts with a minus.

    Args:
        batch_size: sequences.
        length: tokens of a sequence, at least 2; the `=` counts.
        modulus: the numbers are 0 .. modulus - 1.
        brackets: whether expressions hold brackets.
        generator: the source of randomness.

    Returns:
        Tokens and targets, of which the last one is scored.

    Raises:
        ValueError, TypeError: if a size or the modulus is no positive int, or `length` is 1.

    Source:
        *Neural Networks and the Chomsky Hierarchy*, tasks "modular arithmetic (simple)" and "modular arithmetic".
    """
    _size(batch_size, length)
    checks.positive_int("modulus", modulus)
    if length < 2:
        raise ValueError(f"length: expected at least 2, a digit and '=', got {length}")
    tokens = _expressions(batch_size, length - 1, modulus, brackets, generator)
    equals = torch.full((batch_size, 1), modulus + 5)
    targets = torch.full((batch_size, length), IGNORED)
    targets[:, -1] = _values(tokens, modulus)
    return TaskBatch(torch.cat((tokens, equals), 1), targets)


def _expressions(batch_size: int, length: int, modulus: int, brackets: bool, generator: Generator | None) -> Tensor:
    """Random expressions `(batch_size, length)`, written from left to right; brackets open and close as far as the rest has room."""
    size = (batch_size, length)
    digits = torch.randint(modulus, size, generator=generator)
    operators = modulus + torch.randint(3, size, generator=generator)
    turn = torch.rand(size, generator=generator) < 1 / 3
    tokens = torch.empty_like(digits)
    signed = 1 - length % 2
    tokens[:, :signed] = modulus + 1
    depth = torch.zeros(batch_size, dtype=torch.int64)
    operand = torch.ones(batch_size, dtype=torch.bool)  # whether an operand is due, else an operator
    for t in range(signed, length):
        room = length - t
        opens = operand & turn[:, t] & (room >= depth + 3) & brackets  # room for '(', a digit and all ')'
        closes = ~operand & (depth > 0) & (turn[:, t] | (room < depth + 2))  # no room for an operator and a digit: only ')' is left
        tokens[:, t] = torch.where(operand, digits[:, t], operators[:, t])
        tokens[:, t] = torch.where(opens, modulus + 3, torch.where(closes, modulus + 4, tokens[:, t]))
        depth += opens.long() - closes.long()
        operand = opens | ~(operand | closes)
    return tokens


def _values(tokens: Tensor, modulus: int) -> Tensor:
    """The value of each expression modulo `modulus`: a sum of finished terms and a running product at every depth of brackets."""
    rows, depths = torch.arange(len(tokens)), tokens.shape[1] // 2 + 1
    total = torch.zeros(len(tokens), depths, dtype=torch.int64)
    term = torch.zeros_like(total)
    pending = torch.full_like(total, modulus)  # the operator before the next operand, at first '+'
    depth = torch.zeros_like(rows)
    for token in tokens.T:
        opens, closes = token == modulus + 3, token == modulus + 4
        operand = torch.where(closes, total[rows, depth] + term[rows, depth], token)
        depth = depth + opens.long() - closes.long()
        here, given = (rows, depth), (token < modulus) | closes
        times, minus = pending[here] == modulus + 2, pending[here] == modulus + 1
        product = torch.where(times, term[here] * operand, torch.where(minus, -operand, operand)) % modulus
        total[here] = torch.where(given & ~times, total[here] + term[here], torch.where(opens, 0, total[here])) % modulus
        term[here] = torch.where(given, product, torch.where(opens, 0, term[here]))
        pending[here] = torch.where(opens, modulus, torch.where(given, pending[here], token))
    return (total[:, 0] + term[:, 0]) % modulus


def group_elements(group: str) -> Tensor:
    """The elements of a permutation group, in the order in which `group_word_problem` numbers them.

    Args:
        group: `"Sn"`, all permutations of n points; `"An"`, the even ones; `"Zn"`, the cyclic shifts. Sn and An up to n = 8.

    Returns:
        Int64 `(order, n)`, row p the tuple p(0), .., p(n - 1); in lexicographic order, so that row 0 is the identity.

    Raises:
        ValueError, TypeError: if `group` is none of these.
    """
    return _elements(group).clone()


def _elements(group: str) -> Tensor:
    match = re.fullmatch(r"([SAZ])([1-9]\d*)", group) if isinstance(group, str) else None
    if match is None or (match[1] != "Z" and int(match[2]) > MOST_POINTS):
        error = ValueError if isinstance(group, str) else TypeError
        raise error(f"group: expected 'Sn' or 'An' with n = 1 .. {MOST_POINTS}, or 'Zn', got {group!r}")
    return _permutations(match[1], int(match[2]))


@lru_cache
def _permutations(kind: str, points: int) -> Tensor:
    if kind == "Z":
        return (torch.arange(points)[:, None] + torch.arange(points)) % points
    every = torch.tensor(list(permutations(range(points))))
    inversions = (every[:, :, None] > every[:, None, :]).triu(1).sum((1, 2))
    return every if kind == "S" else every[inversions % 2 == 0]


def group_word_problem(
    batch_size: int, length: int, *, group: str = "S3", generators: Literal["all", "swaps"] = "all", generator: Generator | None = None
) -> TaskBatch:
    """Elements of a group, and at every position their product so far, `acc_t = acc_{t-1} x_t` with `(p q)(i) = p[q[i]]`.

    Args:
        batch_size: sequences.
        length: tokens of a sequence.
        group: `"Sn"`, `"An"` or `"Zn"`; token i is row i of `group_elements(group)`, 0 the identity.
        generators: `"all"` draws every element, `"swaps"` the identity and the transpositions only.
        generator: the source of randomness.

    Returns:
        Tokens and targets, every position scored.

    Raises:
        ValueError, TypeError: if a size is no positive int, the group is unknown, or it has no transpositions where these are asked for.

    Source:
        *The Illusion of State in State-Space Models* (word problems); *DeltaProduct* (swaps).
    """
    size = _size(batch_size, length)
    elements = _elements(group)
    checks.choice("generators", generators, ("all", "swaps"))
    if generators == "all":
        inputs = torch.randint(len(elements), size, generator=generator)
    else:
        moved = (elements != torch.arange(elements.shape[1])).sum(1)
        swaps = (moved <= 2).nonzero()[:, 0]
        if len(swaps) == 1:
            raise ValueError(f"generators: expected 'all', since {group} has no transpositions, got 'swaps'")
        inputs = swaps[torch.randint(len(swaps), size, generator=generator)]
    if group.startswith("Z"):
        return TaskBatch(inputs, inputs.cumsum(1) % len(elements))
    return TaskBatch(inputs, _number(_prefix_products(elements[inputs]), elements))


def _prefix_products(permutation: Tensor) -> Tensor:
    """Products `x_0 .. x_t` of permutations `(B, T, n)`, by doubling: in log2 T steps row t holds the last 2, 4, 8, .. factors."""
    reach = 1
    while reach < permutation.shape[1]:
        longer = permutation[:, :-reach].gather(2, permutation[:, reach:])
        permutation = torch.cat((permutation[:, :reach], longer), 1)
        reach *= 2
    return permutation


def _number(permutation: Tensor, elements: Tensor) -> Tensor:
    """The row of `elements` that holds each permutation; read as digits of a number, their lexicographic order is that of numbers."""
    points = elements.shape[1]
    place = points ** torch.arange(points - 1, -1, -1)
    return torch.searchsorted((elements * place).sum(-1), (permutation * place).sum(-1))


def mqar(
    batch_size: int,
    length: int,
    *,
    vocab_size: int = 128,
    num_pairs: int = 4,
    power_a: float | None = None,
    generator: Generator | None = None,
) -> TaskBatch:
    """Multi-query associative recall: pairs of a key and a value, then every key once again; its value is asked there.

    Keys are 1 .. vocab_size // 2 - 1, values vocab_size // 2 .. vocab_size - 1, each drawn without repetition; the rest is filled with 0.

    Args:
        batch_size: sequences.
        length: tokens of a sequence, at least 4 num_pairs.
        vocab_size: tokens.
        num_pairs: keys of a sequence.
        power_a: the gap (1, 2, .. steps of two tokens after the pairs) at which a key comes again is drawn with probability proportional
            to gap^(power_a - 1), so that small values put queries early; None draws every gap alike.
        generator: the source of randomness.

    Returns:
        Tokens and targets, of which those at the num_pairs queries are scored.

    Raises:
        ValueError, TypeError: if a size is no positive int, the sequence or the vocabulary has no room, or `power_a` is not positive.

    Source:
        *Zoology: Measuring and Improving Recall in Efficient Language Models*.
    """
    _size(batch_size, length)
    checks.positive_int("num_pairs", num_pairs)
    half = checks.positive_int("vocab_size", vocab_size) // 2
    if length < 4 * num_pairs:
        raise ValueError(f"length: expected at least 4 num_pairs = {4 * num_pairs}, got {length}")
    if half - 1 < num_pairs:
        raise ValueError(f"vocab_size: expected at least 2 num_pairs + 2 = {2 * num_pairs + 2}, got {vocab_size}")
    gap = torch.arange(1, length // 2 - num_pairs + 1, dtype=torch.float64)
    slope = 0.0 if power_a is None else checks.in_range("power_a", power_a, 0, low_open=True) - 1
    keys = 1 + _draw(torch.zeros(half - 1), batch_size, num_pairs, generator)
    values = half + _draw(torch.zeros(vocab_size - half), batch_size, num_pairs, generator)
    queries = 2 * num_pairs + 2 * _draw(slope * gap.log(), batch_size, num_pairs, generator)
    inputs, targets = torch.zeros(batch_size, length, dtype=torch.int64), torch.full((batch_size, length), IGNORED)
    inputs[:, : 2 * num_pairs] = torch.stack((keys, values), 2).flatten(1)
    return TaskBatch(inputs.scatter(1, queries, keys), targets.scatter(1, queries, values))


def _draw(logits: Tensor, batch_size: int, count: int, generator: Generator | None) -> Tensor:
    """`count` different indices `(batch_size, count)` with probabilities softmax(logits), one after the other (the Gumbel-top-k trick)."""
    waiting = torch.empty(batch_size, len(logits), dtype=torch.float64).exponential_(generator=generator)
    return (logits - waiting.log()).topk(count).indices


@dataclass(frozen=True)
class ExtrapolationResult:
    """Accuracies, as shares of 1, at several lengths.

    Args:
        lengths: int64 `(L,)`.
        token_accuracy: share of all scored positions that are right, float64 `(L,)`.
        last_accuracy: share of the sequences whose last scored position is right, float64 `(L,)`.
        sequence_accuracy: share of the sequences whose scored positions are all right, float64 `(L,)`.
    """

    lengths: Tensor
    token_accuracy: Tensor
    last_accuracy: Tensor
    sequence_accuracy: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the accuracies over the length.

        Args:
            ax: axes to draw into; new ones without.

        Returns:
            The axes.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("plot needs matplotlib: pip install 'phyla-linear-rnn[plot]'") from error
            ax = pyplot.subplots()[1]
        for label in ("token", "last", "sequence"):
            ax.plot(self.lengths.tolist(), getattr(self, f"{label}_accuracy").tolist(), marker="o", label=label)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("length")
        ax.set_ylabel("accuracy")
        ax.legend()
        return ax


def length_extrapolation(
    model: nn.Module,
    task: Callable[..., TaskBatch],
    lengths: Sequence[int],
    *,
    batch_size: int = 256,
    generator: Generator | None = None,
    **task_options: object,
) -> ExtrapolationResult:
    """Measure a model's answers to a task at several lengths, one fresh batch a length.

    Args:
        model: maps tokens `(B, T)` to logits `(B, T, vocabulary)`, or to a tuple that starts with them; it answers in evaluation mode.
        task: a function of this module, or one like it.
        lengths: tokens of a sequence.
        batch_size: sequences for each length.
        generator: the source of randomness.
        task_options: passed to the task.

    Returns:
        The accuracies, one for each length.

    Raises:
        ValueError: if `lengths` is empty or the logits have another shape.
    """
    if len(lengths) == 0:
        raise ValueError("lengths: expected at least one length, got none")
    was_training = model.training
    model.eval()
    try:
        rows = [_accuracies(model, task(batch_size, length, generator=generator, **task_options)) for length in lengths]
    finally:
        model.train(was_training)
    token, last, sequence = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    return ExtrapolationResult(torch.tensor(list(lengths)), token, last, sequence)


@torch.no_grad()
def _accuracies(model: nn.Module, batch: TaskBatch) -> tuple[float, float, float]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    found = model(inputs)
    logits = checks.shape("logits", found[0] if isinstance(found, tuple) else found, (*inputs.shape, None))
    scored = targets != IGNORED
    right = (logits.argmax(-1) == targets) & scored
    last = (scored * torch.arange(1, 1 + inputs.shape[1], device=device)).argmax(1, keepdim=True)
    token, final, every = right.sum() / scored.sum(), right.gather(1, last).double().mean(), (right == scored).all(1).double().mean()
    return token.item(), final.item(), every.item()


def _size(batch_size: int, length: int) -> tuple[int, int]:
    return checks.positive_int("batch_size", batch_size), checks.positive_int("length", length)
