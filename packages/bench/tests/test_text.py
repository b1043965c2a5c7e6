import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from phyla.bench.text import count_model_bits, language_reference


def test_the_text_is_large_english_and_the_same_every_time():
    corpus = language_reference()
    assert len(corpus.train) > 200_000
    assert len(corpus.test) == pytest.approx(len(corpus.train) / 9, abs=1)
    text = corpus.decode(corpus.train.tolist())
    assert "The simple form" in text
    assert text.count(" the ") > 2000
    assert set(text) <= set(corpus.alphabet)
    assert corpus.encode("The statement") == [corpus.alphabet.index(each) for each in "The statement"]
    assert np.array_equal(corpus.train, language_reference().train)
    assert "language reference" in corpus.source


def test_no_paragraph_of_the_test_part_was_seen_in_training():
    corpus = language_reference()
    train, test = (corpus.decode(part.tolist()).split("\n") for part in (corpus.train, corpus.test))
    assert not set(train[:-1]) & set(test[1:-1])


def witten_bell(train, test, order, characters):
    """The definition, one character at a time."""
    seen = defaultdict(Counter)
    for length in range(order):
        for place in range(length, len(train)):
            seen[tuple(train[place - length : place])][train[place]] += 1

    def chance(context, character):
        lower = chance(context[1:], character) if context else 1 / characters
        counts = seen[context]
        return (counts[character] + len(counts) * lower) / (counts.total() + len(counts)) if counts else lower

    bits = [-math.log2(chance(tuple(test[place - order + 1 : place]), test[place])) for place in range(order - 1, len(test))]
    return sum(bits) / len(bits)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_count_model_is_witten_bell(order):
    generator = np.random.default_rng(0)
    train, test = (np.cumsum(generator.integers(0, 3, size)) % 7 for size in (400, 150))
    expected = witten_bell(train.tolist(), test.tolist(), order, 8)
    assert count_model_bits(train, test, order, 8) == pytest.approx(expected, rel=1e-12)


def test_the_count_model_learns_a_rule_and_knows_its_limit():
    train = np.arange(10_000) % 5
    assert count_model_bits(train, train[:100], 2, 5) < 0.01
    uniform = np.random.default_rng(0).integers(0, 4, 20_000)
    assert count_model_bits(uniform, uniform[::-1], 3, 4) == pytest.approx(2, abs=0.01)
    with pytest.raises(ValueError, match=r"order: expected n-grams below 2\^63, got 100\^10"):
        count_model_bits(train, train, 10, 100)
