"""Sequences: state tracking beyond the training length, recall, and a character-level language model that streams."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from phyla.bench import Board, Chart, Context, Line, Measurement, Metric, PipelineResult, Table
from phyla.bench.measure import at_the_best_rate, count_parameters, train
from phyla.bench.sandbox import Progress
from phyla.bench.text import Corpus, count_model_bits, language_reference
from phyla.linear_rnn import (
    MLSTM,
    RWKV7,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedDeltaProduct,
    GatedLinearAttention,
    LinearRNNLM,
    Mamba2,
)
from phyla.linear_rnn.tasks import TaskBatch, group_word_problem, length_extrapolation, mqar, parity

RATES = (2e-3, 5e-3, 1e-2, 2e-2)
DEPTH, STREAMS, WINDOW, SAMPLE, ORDERS = 2, 16, 128, 400, range(1, 7)
PROMPT = "The statement "

ABOUT = """
State tracking: the running XOR of bits (parity) and the running product of permutations of three things (the S3 word problem). A
model is trained on sequences of one length and answers sequences up to 16 times as long; the score is the share of right answers at
4 times the training length. Theory says: a linear recurrence whose transitions have eigenvalues in [0, 1] (DeltaNet without negative
eigenvalues, GLA, Mamba-2) cannot follow parity at every length; one reflection a token (n = 1) with eigenvalues in [-1, 1] can, but S3
takes two. The GRU of a full run is the nonlinear recurrence that a linear one gives up.

Recall (MQAR): 6 pairs of a key and a value, then every key once more; the score is the share of keys whose value is answered. At longer
lengths the keys come later.

Language: characters of {source}, {size:,} of them for training and the last tenth for testing, each paragraph once; the score is bits
per character, read in streams with the state carried along. Beside the models of equal size stands a count model (n-grams with
Witten-Bell smoothing, the best order) that has no size limit.

All models of a board are the same network (embedding, mixer, SwiGLU, output) with another mixer; the width of the SwiGLU is chosen
so that all have the same number of parameters up to 5 %. Training is the same: AdamW, one-cycle schedule, equally many steps on data
drawn afresh. Only the learning rate is each model's own, picked from 0.002, 0.005, 0.01 and 0.02 on data not used for the score. A quick
run takes one fixed rate a model, fewer steps and fewer models: compare models by a full run.
"""


class GRU(nn.Module):
    """The gated recurrent unit as a mixer: `(y, state)` from `(x, state)`, like the layers of phyla-linear-rnn."""

    def __init__(self, width: int, layer: int) -> None:
        super().__init__()
        self.cell = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return outputs and the last hidden state; the networks here feed batches, never packed sequences."""
        y, state = self.cell(x, state)
        return y, state


Mixer = Callable[[int, int], nn.Module]
"""Builds the mixer of a hidden width and a layer."""


@dataclass(frozen=True)
class Model:
    """A contestant: its mixer, the learning rate of quick runs, whether quick runs have it."""

    name: str
    mixer: Mixer
    rate: float
    baseline: bool = False
    quick: bool = True


def tracker(n: int, negative: bool = True) -> Mixer:
    """A delta product of n reflections a token with heads of 16; nothing else in the layer remembers."""
    return lambda width, _: DeltaProduct(
        width, num_heads=width // 16, num_householder=n, allow_neg_eigval=negative, use_output_gate=False, use_short_conv=False
    )


def mamba(width: int, layer: int) -> nn.Module:
    """Mamba-2 with heads and a state of 16."""
    return Mamba2(width, state_size=16, head_dim=16)


TRACKERS = (
    Model("DeltaProduct, n = 1", tracker(1), 1e-2),
    Model("DeltaProduct, n = 2", tracker(2), 1e-2),
    Model("DeltaProduct, n = 3", tracker(3), 1e-2),
    Model("DeltaNet, eigenvalues in [0, 1]", tracker(1, negative=False), 1e-2),
    Model("GLA", lambda width, _: GatedLinearAttention(width, num_heads=width // 16, expand_k=1.0), 1e-2, baseline=True),
    Model("Mamba-2", mamba, 1e-2, baseline=True),
    Model("GRU", GRU, 1e-2, baseline=True, quick=False),
)

RECALLERS = (
    Model("DeltaNet", lambda width, _: DeltaNet(width, num_heads=1), 1e-2),
    Model("Gated DeltaNet", lambda width, _: GatedDeltaNet(width, num_heads=1, expand_v=1.0), 1e-2),
    Model("DeltaProduct, n = 2", lambda width, _: DeltaProduct(width, num_heads=1, use_output_gate=False), 1e-2, quick=False),
    Model("GLA", lambda width, _: GatedLinearAttention(width, num_heads=1, expand_k=1.0, use_short_conv=True), 1e-2, baseline=True),
    Model("Mamba-2", lambda width, _: Mamba2(width, state_size=32, head_dim=32), 1e-2, baseline=True),
    Model("GRU", GRU, 1e-2, baseline=True, quick=False),
)

WRITERS = (
    Model("Gated DeltaNet", lambda width, _: GatedDeltaNet(width, num_heads=2, expand_v=1.0), 1e-2),
    Model("Gated DeltaProduct, n = 2", lambda width, _: GatedDeltaProduct(width, num_heads=2), 1e-2),
    Model("RWKV-7", lambda width, layer: RWKV7(width, head_dim=width // 2, layer_idx=layer, num_layers=DEPTH), 1e-2, quick=False),
    Model("mLSTM", lambda width, _: MLSTM(width, num_heads=2, expand=1.0), 1e-2, quick=False),
    Model("GLA", lambda width, _: GatedLinearAttention(width, num_heads=2, use_short_conv=True), 1e-2, quick=False),
    Model("Mamba-2", lambda width, _: Mamba2(width, state_size=32, head_dim=32), 1e-2, quick=False),
    Model("GRU", GRU, 1e-2, baseline=True),
)

WRITER_SIZES = ((64, 90_000), (128, 310_000))
"""Width and parameters of the language models in a quick and in a full run."""


@dataclass(frozen=True)
class Task:
    """A synthetic task: how to draw it, its tokens, the network's width and size, what it is trained and scored on.

    Args:
        draw: `draw(batch_size, length, generator=...)`.
        tokens: size of the vocabulary.
        width: hidden width.
        parameters: of every contestant, up to 5 %.
        batch: sequences of a training step.
        length: of the training sequences.
        lengths: of the test sequences.
        scored: the test length whose accuracy is the score.
        steps: training steps of a quick and of a full run.
        models: the contestants.
    """

    name: str
    draw: Callable[..., TaskBatch]
    tokens: int
    width: int
    parameters: int
    batch: int
    length: int
    lengths: tuple[int, ...]
    scored: int
    steps: tuple[int, int]
    models: tuple[Model, ...]


TASKS = (
    Task("parity", parity, 2, 32, 12_000, 64, 16, (8, 16, 32, 64, 128, 256), 64, (150, 600), TRACKERS),
    Task("S3", group_word_problem, 6, 64, 40_000, 64, 12, (6, 12, 24, 48, 96, 192), 48, (250, 1000), TRACKERS),
    Task("MQAR", partial(mqar, vocab_size=32, num_pairs=6), 32, 32, 14_000, 64, 24, (24, 48, 96, 192), 24, (150, 600), RECALLERS),
)


def network(mixer: Mixer, tokens: int, width: int, depth: int, parameters: int) -> LinearRNNLM:
    """Build a network whose SwiGLU is as wide as the parameters allow."""

    def build(inner: int) -> LinearRNNLM:
        return LinearRNNLM(tokens, width, depth, mixer=partial(mixer, width), intermediate_size=inner)

    return build(max(1, 1 + round((parameters - count_parameters(build(1))) / (3 * width * depth))))


def cross_entropy(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss of a batch that holds inputs and targets; targets that are not scored are ignored."""
    logits, _ = model(batch[0])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, batch: Tensor) -> float:
    """The loss of a batch; not-a-number where training diverged."""
    return cross_entropy(model, batch).item()


def train_and_pick(
    build: Callable[[], LinearRNNLM],
    batches: Callable[[int], Iterator[Tensor]],
    held_out: Tensor,
    seeds: Sequence[int],
    rates: Sequence[float],
    steps: int,
    progress: Progress,
) -> tuple[float, list[LinearRNNLM], float]:
    """Train a network a seed, with the rate of the lowest loss on held-out data if there is a choice.

    Returns:
        The rate, the networks, the median time of a step in milliseconds.
    """
    times: list[float] = []

    def once(seed: int, rate: float, told: Progress) -> LinearRNNLM:
        def after_step(step: int) -> None:
            if step % 20 == 0:
                told(step / steps)

        torch.manual_seed(seed)
        model = build()
        times.extend(train(model, cross_entropy, batches(seed), steps=steps, rate=rate, weight_decay=0.01, after_step=after_step).seconds)
        return model.eval()

    rate, networks = at_the_best_rate(
        lambda rate, told: held_out_loss(once(seeds[0], rate, told), held_out), once, rates=rates, seeds=seeds, progress=progress
    )
    return rate, networks, 1e3 * float(np.median(times))


@dataclass(frozen=True)
class Learned:
    """What a trial of a synthetic task gives back; `accuracies` in percent, one row a seed, one column a test length."""

    rate: float
    accuracies: tuple[tuple[float, ...], ...]
    parameters: int
    step_ms: float


def learn(progress: Progress, task_name: str, model_name: str, seeds: Sequence[int], rates: Sequence[float], steps: int) -> Learned:
    """Train a model on a task and test it at every length."""
    task = next(each for each in TASKS if each.name == task_name)
    model = next(each for each in task.models if each.name == model_name)

    def batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.stack(task.draw(task.batch, task.length, generator=generator))

    rate, networks, step_ms = train_and_pick(
        lambda: network(model.mixer, task.tokens, task.width, 1, task.parameters),
        batches,
        next(batches(2_000_003)),
        seeds,
        rates,
        steps,
        progress,
    )
    rows = []
    for seed, each in zip(seeds, networks, strict=True):
        fresh = torch.Generator().manual_seed(seed + 1_000_003)
        found = length_extrapolation(each, task.draw, task.lengths, batch_size=128, generator=fresh)
        rows.append(tuple((100 * found.token_accuracy).tolist()))
    return Learned(rate, tuple(rows), count_parameters(networks[0]), step_ms)


@dataclass(frozen=True)
class Written:
    """What a trial of the language model gives back; `sample` and `character_ms` are the first seed's."""

    rate: float
    bits: tuple[float, ...]
    parameters: int
    step_ms: float
    sample: str
    character_ms: float


def write(
    progress: Progress, model_name: str, width: int, parameters: int, seeds: Sequence[int], rates: Sequence[float], steps: int
) -> Written:
    """Train a language model on the text, measure its bits per character and let it write."""
    corpus = language_reference()
    model = next(each for each in WRITERS if each.name == model_name)
    text, test = torch.from_numpy(corpus.train), torch.from_numpy(corpus.test)
    held_out = len(text) // 20

    def windows(seed: int, text: Tensor = text[:-held_out]) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        every = text.unfold(0, WINDOW + 1, 1)
        while True:
            rows = every[torch.randint(len(every), (STREAMS,), generator=generator)]
            yield torch.stack((rows[:, :-1], rows[:, 1:]))

    rate, networks, step_ms = train_and_pick(
        lambda: network(model.mixer, len(corpus.alphabet), width, DEPTH, parameters),
        windows,
        next(windows(2_000_003, text[-held_out:])),
        seeds,
        rates,
        steps,
        progress,
    )
    start = time.perf_counter()
    prompt = torch.tensor([corpus.encode(PROMPT)])
    ids = networks[0].generate(prompt, SAMPLE, temperature=0.7, generator=torch.Generator().manual_seed(seeds[0]))
    character_ms = 1e3 * (time.perf_counter() - start) / SAMPLE
    sample = corpus.decode(ids[0, -SAMPLE:].tolist())
    return Written(
        rate, tuple(bits_per_character(each, test) for each in networks), count_parameters(networks[0]), step_ms, sample, character_ms
    )


@torch.no_grad()
def bits_per_character(model: nn.Module, text: Tensor) -> float:
    """Read the text in parallel streams, window after window with the state carried along."""
    streams = text[: len(text) // STREAMS * STREAMS].view(STREAMS, -1)
    total, states = 0.0, None
    for rows in streams.unfold(1, WINDOW + 1, WINDOW).unbind(1):
        logits, states = model(rows[:, :-1], states)
        total += nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item() / math.log(2)
    return total / ((streams.shape[1] - 1) // WINDOW)


def task_board(context: Context, task: Task, seeds: Sequence[int]) -> tuple[tuple[Measurement, ...], Chart]:
    """Train every contestant on a task; return the scores and the accuracies over the length."""
    steps = context.pick(*task.steps)
    measurements, lines = [], []
    for model in contestants(context, task.models):
        rates = context.pick((model.rate,), RATES)
        trial = context.trial(f"{task.name}: {model.name}", learn, task.name, model.name, seeds, rates, steps)
        found = trial.value
        scores = tuple(row[task.lengths.index(task.scored)] for row in found.accuracies)
        recipe = f"{steps} steps, rate {found.rate:g}"
        measurements.append(
            Measurement(model.name, scores, found.parameters, found.step_ms, trial.peak_mib, task.name, model.baseline, recipe)
        )
        means = tuple(float(each) for each in np.mean(found.accuracies, axis=0))
        lines.append(Line(model.name, tuple(map(float, task.lengths)), means, model.baseline))
    title = f"{task.name}, trained at length {task.length}: accuracy against length"
    return tuple(measurements), Chart(title, "length", "accuracy (%), mean over seeds", tuple(lines))


def contestants(context: Context, models: Sequence[Model]) -> tuple[Model, ...]:
    """Return the models of this mode."""
    return tuple(each for each in models if context.full or each.quick)


def writing(context: Context, seeds: Sequence[int], corpus: Corpus) -> tuple[Board, tuple[Table, ...]]:
    """Train every language model; return their bits per character, the count models' and what they write."""
    size, steps = context.pick(*WRITER_SIZES), context.pick(70, 3000)
    measurements, samples = [], []
    for model in contestants(context, WRITERS):
        trial = context.trial(f"language: {model.name}", write, model.name, *size, seeds, context.pick((model.rate,), RATES), steps)
        found = trial.value
        recipe = f"{steps} steps, rate {found.rate:g}"
        measurements.append(
            Measurement(model.name, found.bits, found.parameters, found.step_ms, trial.peak_mib, "", model.baseline, recipe)
        )
        samples.append((model.name, f"{found.character_ms:.2f}", PROMPT + found.sample.replace("\n", " ¶ ")))
    board = Board("Bits per character", Metric("bits per character", better="lower"), tuple(measurements))
    counted = [(str(order), f"{count_model_bits(corpus.train, corpus.test, order, len(corpus.alphabet)):.2f}") for order in ORDERS]
    header = ("model", "ms / character", f"what it writes after {PROMPT!r}, one character after the other from a state of fixed size")
    return board, (Table("Count models", ("n-gram order", "bits per character"), tuple(counted)), Table("Samples", header, tuple(samples)))


def run(context: Context) -> PipelineResult:
    """Train every contestant on every task and on the text."""
    corpus = language_reference()
    seeds, writing_seeds = context.seeds(1, 5), context.seeds(1, 2)
    context.plan(sum(len(contestants(context, models)) for models in (*(task.models for task in TASKS), WRITERS)))
    (parity_rows, parity_chart), (s3_rows, s3_chart), (recall_rows, recall_chart) = (task_board(context, task, seeds) for task in TASKS)
    text_board, tables = writing(context, writing_seeds, corpus)
    percent = Metric("accuracy", "%")
    boards = (
        Board("State tracking beyond the training length", percent, parity_rows + s3_rows),
        Board("Recall", percent, recall_rows),
        text_board,
    )
    for board in boards:
        board.require_equal_budget()
    about = ABOUT.format(source=corpus.source, size=len(corpus.train))
    return PipelineResult(
        "Sequences: state tracking, recall and language with linear recurrences",
        about,
        seeds,
        boards,
        (parity_chart, s3_chart, recall_chart),
        tables,
    )
