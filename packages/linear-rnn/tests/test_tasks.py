"""Every task against its plain definition, one sequence at a time in Python."""

import dataclasses
import itertools
import sys
from collections import Counter
from functools import reduce

import matplotlib as mpl
import pytest
import torch
from torch import nn

from phyla.linear_rnn import tasks

mpl.use("Agg")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


TASKS = {
    "parity": tasks.parity,
    "modular_addition": tasks.modular_addition,
    "modular_arithmetic": tasks.modular_arithmetic,
    "brackets": lambda *args, **kwargs: tasks.modular_arithmetic(*args, brackets=True, **kwargs),
    "S4": lambda *args, **kwargs: tasks.group_word_problem(*args, group="S4", **kwargs),
    "swaps": lambda *args, **kwargs: tasks.group_word_problem(*args, generators="swaps", **kwargs),
    "mqar": tasks.mqar,
    "mqar power": lambda *args, **kwargs: tasks.mqar(*args, power_a=0.1, **kwargs),
}

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@every_task
def test_batches_are_integers_and_follow_the_generator(task):
    first, again, other = task(7, 24, generator=seeded(1)), task(7, 24, generator=seeded(1)), task(7, 24, generator=seeded(2))
    for each in first:
        assert each.shape == (7, 24)
        assert each.dtype == torch.int64
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, other.inputs)
    assert (first.targets != tasks.IGNORED).any(1).all()


@every_task
def test_sequences_of_a_batch_differ_and_moving_the_generator_moves_the_batch(task):
    generator = seeded()
    first, second = task(64, 24, generator=generator), task(64, 24, generator=generator)
    assert len(torch.cat((first.inputs, second.inputs)).unique(dim=0)) > 120


@every_task
@pytest.mark.parametrize(("sizes", "name"), [((0, 24), "batch_size"), ((2, 0), "length"), ((2, -1), "length")])
def test_sizes_are_checked(task, sizes, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        task(*sizes)


def test_parity_is_the_running_xor():
    inputs, targets = tasks.parity(50, 33, generator=seeded())
    assert set(inputs.flatten().tolist()) == {0, 1}
    for bits, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert answers == list(itertools.accumulate(bits, lambda a, b: a ^ b))


@pytest.mark.parametrize("modulus", [1, 2, 5, 7])
def test_modular_addition_is_the_running_sum(modulus):
    inputs, targets = tasks.modular_addition(50, 33, modulus=modulus, generator=seeded())
    assert set(inputs.flatten().tolist()) == set(range(modulus))
    for numbers, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert answers == [total % modulus for total in itertools.accumulate(numbers)]


def written(tokens, modulus):
    """The expression as Python writes it; Python's own parser is the judge of brackets and precedence."""
    return "".join(str(token) if token < modulus else "+-*()="[token - modulus] for token in tokens)


@pytest.mark.parametrize("brackets", [False, True])
@pytest.mark.parametrize("modulus", [2, 5, 7, 11])
@pytest.mark.parametrize("length", [2, 3, 4, 7, 8, 20, 41])
def test_modular_arithmetic_has_the_value_that_python_finds(brackets, modulus, length):
    inputs, targets = tasks.modular_arithmetic(100, length, modulus=modulus, brackets=brackets, generator=seeded(length))
    assert (targets[:, :-1] == tasks.IGNORED).all()
    for tokens, answer in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
        text = written(tokens, modulus)
        assert text.endswith("=")
        assert text.count("=") == 1
        assert eval(text[:-1]) % modulus == answer, text
        assert text.startswith("-") == (length % 2 == 1)
        assert brackets or "(" not in text


def test_brackets_nest_and_matter():
    inputs, targets = tasks.modular_arithmetic(500, 30, brackets=True, generator=seeded())
    texts = [written(tokens, 5)[:-1] for tokens in inputs.tolist()]
    depths = [max(itertools.accumulate((c == "(") - (c == ")") for c in text)) for text in texts]
    assert {0, 1, 2, 3} <= set(depths)
    flat = [eval(text.replace("(", "").replace(")", "")) % 5 for text in texts]
    assert 0.3 < sum(a != b for a, b in zip(flat, targets[:, -1].tolist(), strict=True)) / len(texts) < 0.9
    operators = Counter(c for text in texts for c in text if c in "+-*")
    assert min(operators.values()) > 0.3 * sum(operators.values())


def test_times_binds_tighter():
    inputs, targets = tasks.modular_arithmetic(2000, 6, generator=seeded())
    plus_times = (inputs[:, 1] == 5) & (inputs[:, 3] == 7)
    a, b, c = inputs[plus_times][:, [0, 2, 4]].T
    assert plus_times.sum() > 50
    assert torch.equal(targets[plus_times, -1], (a + b * c) % 5)


def test_a_single_equals_sign_is_no_expression():
    with pytest.raises(ValueError, match="length: expected at least 2"):
        tasks.modular_arithmetic(3, 1)


def compose(p, q):
    return tuple(p[q[i]] for i in range(len(p)))


def even(p):
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0


ELEMENTS = {f"S{n}": list(itertools.permutations(range(n))) for n in range(1, 6)}
ELEMENTS |= {f"A{n}": [p for p in itertools.permutations(range(n)) if even(p)] for n in range(1, 6)}
ELEMENTS |= {f"Z{n}": [tuple((k + i) % n for i in range(n)) for k in range(n)] for n in (1, 2, 6, 24)}


@pytest.mark.parametrize("group", ELEMENTS)
def test_elements_are_numbered_in_lexicographic_order(group):
    rows = [tuple(row) for row in tasks.group_elements(group).tolist()]
    assert rows == ELEMENTS[group]
    assert rows == sorted(rows)
    assert rows[0] == tuple(range(len(rows[0])))


@pytest.mark.parametrize("group", ELEMENTS)
def test_targets_are_products_of_permutations(group):
    elements = ELEMENTS[group]
    inputs, targets = tasks.group_word_problem(20, 37, group=group, generator=seeded(3))
    for word, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        products = itertools.accumulate((elements[x] for x in word), compose)
        assert answers == [elements.index(p) for p in products]


@pytest.mark.parametrize("group", ["S3", "S4", "A4", "Z6"])
def test_the_targets_multiply_as_a_group(group):
    """Pairs of elements, read through the task itself, obey the axioms: closure, identity, inverses, associativity."""
    order = len(ELEMENTS[group])
    inputs, targets = tasks.group_word_problem(40 * order**2, 2, group=group, generator=seeded(1))
    table = torch.full((order, order), -1)
    table[inputs[:, 0], inputs[:, 1]] = targets[:, 1]
    assert (table >= 0).all()
    everything = torch.arange(order)
    assert torch.equal(table[0], everything)
    assert torch.equal(table[:, 0], everything)
    assert torch.equal(table.sort(0).values, everything[:, None].expand(order, order))
    assert torch.equal(table.sort(1).values, everything.expand(order, order))
    assert torch.equal(table[table], table[everything[:, None, None], table])


def test_every_element_is_drawn_about_equally_often():
    inputs, _ = tasks.group_word_problem(200, 60, group="S4", generator=seeded())
    counts = inputs.flatten().bincount(minlength=24)
    assert counts.min() > 400
    assert counts.max() < 600


def test_swaps_draw_the_identity_and_transpositions():
    inputs, targets = tasks.group_word_problem(100, 40, group="S4", generators="swaps", generator=seeded())
    moved = {x: sum(i != p for i, p in enumerate(ELEMENTS["S4"][x])) for x in range(24)}
    assert set(inputs.flatten().tolist()) == {x for x in range(24) if moved[x] in (0, 2)}
    assert len(targets.unique()) == 24
    assert reduce(compose, (ELEMENTS["S4"][x] for x in inputs[0].tolist())) == ELEMENTS["S4"][targets[0, -1]]


def test_a_long_word_of_a_large_group():
    inputs, targets = tasks.group_word_problem(2, 700, group="S7", generator=seeded())
    elements = list(itertools.permutations(range(7)))
    assert reduce(compose, (elements[x] for x in inputs[1].tolist())) == elements[targets[1, -1]]


@pytest.mark.parametrize("group", ["S", "S0", "D4", "s3", "S9", "A9", "S3 ", "Z0", ""])
def test_unknown_groups_are_named(group):
    with pytest.raises(ValueError, match=r"group: expected 'Sn' or 'An' with n = 1 \.\. 8, or 'Zn', got "):
        tasks.group_word_problem(2, 3, group=group)


def test_other_wrong_words():
    with pytest.raises(TypeError, match="group: expected 'Sn'"):
        tasks.group_word_problem(2, 3, group=["S3"])
    with pytest.raises(ValueError, match="generators: expected one of 'all', 'swaps', got 'swap'"):
        tasks.group_word_problem(2, 3, generators="swap")
    with pytest.raises(ValueError, match="generators: expected 'all', since A4 has no transpositions"):
        tasks.group_word_problem(2, 3, group="A4", generators="swaps")
    with pytest.raises(TypeError, match="modulus: expected a positive int"):
        tasks.modular_addition(2, 3, modulus=2.5)


@pytest.mark.parametrize(
    ("length", "vocab_size", "num_pairs", "power_a"), [(16, 128, 4, None), (48, 64, 12, 0.01), (49, 27, 12, 1.0), (300, 21, 3, 60.0)]
)
def test_recall_asks_every_key_once(length, vocab_size, num_pairs, power_a):
    inputs, targets = tasks.mqar(200, length, vocab_size=vocab_size, num_pairs=num_pairs, power_a=power_a, generator=seeded())
    half, context = vocab_size // 2, 2 * num_pairs
    for tokens, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        keys, values = tokens[:context:2], tokens[1:context:2]
        assert len(set(keys)) == len(set(values)) == num_pairs
        assert set(keys) <= set(range(1, half))
        assert set(values) <= set(range(half, vocab_size))
        pairs = dict(zip(keys, values, strict=True))
        asked = {t: tokens[t] for t in range(context, length) if tokens[t] != 0}
        assert sorted(asked.values()) == sorted(keys)
        assert all((t - context) % 2 == 0 for t in asked)
        assert {t: pairs[key] for t, key in asked.items()} == {t: a for t, a in enumerate(answers) if a != tasks.IGNORED}


def test_recall_uses_the_whole_vocabulary_and_every_place():
    inputs, targets = tasks.mqar(4000, 20, vocab_size=16, num_pairs=2, generator=seeded())
    assert set(inputs[:, 0].tolist()) == set(range(1, 8))
    assert set(inputs[:, 1].tolist()) == set(range(8, 16))
    asked = (targets != tasks.IGNORED).double().mean(0)
    assert asked[4::2] == pytest.approx(torch.full((8,), 0.25).double(), abs=0.03)
    assert asked[5::2].sum() == 0


@pytest.mark.parametrize("power_a", [0.05, 1.0, 2.5])
def test_the_gap_of_a_single_key_follows_the_power_law(power_a):
    _, targets = tasks.mqar(40_000, 12, num_pairs=1, power_a=power_a, generator=seeded())
    seen = (targets != tasks.IGNORED).double().mean(0)[2::2]
    gap = torch.arange(1, 6, dtype=torch.float64)
    expected = gap ** (power_a - 1)
    assert seen == pytest.approx(expected / expected.sum(), abs=0.01)


def test_recall_needs_room():
    with pytest.raises(ValueError, match="length: expected at least 4 num_pairs = 32, got 31"):
        tasks.mqar(2, 31, num_pairs=8)
    with pytest.raises(ValueError, match="vocab_size: expected at least 2 num_pairs \\+ 2 = 10, got 9"):
        tasks.mqar(2, 31, vocab_size=9)
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="power_a: expected a number in"):
            tasks.mqar(2, 31, power_a=bad)


class Oracle(nn.Module):
    """Answers parity right up to token `reach`, then always 0; gives logits alone or with a state."""

    def __init__(self, reach, with_state=True):
        super().__init__()
        self.reach, self.with_state = reach, with_state
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        assert not self.training
        assert not torch.is_grad_enabled()
        answers = (ids.cumsum(1) % 2) * (torch.arange(ids.shape[1]) < self.reach)
        logits = nn.functional.one_hot(answers, 2) * self.scale
        return (logits, None) if self.with_state else logits


@pytest.mark.parametrize("with_state", [True, False])
def test_extrapolation_counts_right_answers(with_state):
    model = Oracle(16, with_state).train()
    result = tasks.length_extrapolation(model, tasks.parity, (8, 16, 64), batch_size=500, generator=seeded())
    assert model.training
    assert result.lengths.tolist() == [8, 16, 64]
    for each in (result.token_accuracy, result.last_accuracy, result.sequence_accuracy):
        assert each.dtype == torch.float64
        assert each[:2].tolist() == [1.0, 1.0]
    assert result.token_accuracy[2] == pytest.approx(0.25 + 0.75 / 2, abs=0.02)
    assert result.last_accuracy[2] == pytest.approx(0.5, abs=0.1)
    assert result.sequence_accuracy[2] == 0.0


def test_extrapolation_against_a_count_by_hand():
    class Guess(nn.Module):
        def forward(self, ids):
            return nn.functional.one_hot(4 + (ids + torch.arange(ids.shape[1])) % 4, 8)

    result = tasks.length_extrapolation(
        Guess(), tasks.mqar, [16, 40], batch_size=3000, generator=seeded(5), vocab_size=8, num_pairs=2, power_a=0.5
    )
    generator = seeded(5)
    for place, length in enumerate((16, 40)):
        inputs, targets = tasks.mqar(3000, length, vocab_size=8, num_pairs=2, power_a=0.5, generator=generator)
        right = [
            [4 + (token + t) % 4 == target for t, (token, target) in enumerate(zip(*row, strict=True)) if target != tasks.IGNORED]
            for row in zip(inputs.tolist(), targets.tolist(), strict=True)
        ]
        assert result.token_accuracy[place] == pytest.approx(sum(map(sum, right)) / 6000)
        assert result.last_accuracy[place] == pytest.approx(sum(row[-1] for row in right) / 3000)
        assert result.sequence_accuracy[place] == pytest.approx(sum(map(all, right)) / 3000)
    assert 0 < result.token_accuracy[0] < 1


def test_extrapolation_is_frozen_and_draws_itself():
    result = tasks.length_extrapolation(Oracle(16), tasks.parity, [8, 32], batch_size=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.lengths = None
    ax = result.plot()
    assert [line.get_label() for line in ax.lines] == ["token", "last", "sequence"]
    assert ax.lines[0].get_xdata().tolist() == [8, 32]
    assert ax.lines[2].get_ydata().tolist() == result.sequence_accuracy.tolist()
    assert result.plot(ax) is ax


def test_a_missing_matplotlib_is_explained(monkeypatch):
    result = tasks.length_extrapolation(Oracle(16), tasks.parity, [8], batch_size=4)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'phyla-linear-rnn\[plot\]'"):
        result.plot()


def test_extrapolation_explains_wrong_calls():
    with pytest.raises(ValueError, match="lengths: expected at least one length"):
        tasks.length_extrapolation(Oracle(16), tasks.parity, [])
    with pytest.raises(ValueError, match=r"logits: expected shape \(4, 8, \*\), got shape \(4, 8\)"):
        tasks.length_extrapolation(nn.Identity(), tasks.parity, [8], batch_size=4)
