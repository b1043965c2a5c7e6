"""A real text for character-level language models, and the count model that they have to beat."""

import math
import platform
import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Corpus:
    """A text as numbers.

    Args:
        alphabet: its characters, sorted; a character's number is its place.
        train: the numbers of the first 90 %, int64.
        test: those of the rest.
        source: where the text comes from, in words.
    """

    alphabet: str
    train: np.ndarray
    test: np.ndarray
    source: str

    def encode(self, text: str) -> list[int]:
        """Return the numbers of a text's characters."""
        return [self.alphabet.index(character) for character in text]

    def decode(self, numbers: list[int]) -> str:
        """Return the text of numbers."""
        return "".join(self.alphabet[number] for number in numbers)


def language_reference() -> Corpus:
    """Return the Python language reference, which every CPython carries as the topics of its `help` (module `pydoc_data.topics`).

    A paragraph is a line; a paragraph that occurs in several topics is kept once, so that nothing of the test part was seen in training.
    """
    from pydoc_data import topics

    paragraphs = [" ".join(each.split()) for topic in topics.topics.values() for each in re.split(r"\n\s*\n", topic)]
    text = "\n".join(dict.fromkeys(each for each in paragraphs if each)) + "\n"
    alphabet = "".join(sorted(set(text)))
    place = {character: number for number, character in enumerate(alphabet)}
    numbers = np.array([place[character] for character in text], dtype=np.int64)
    cut = len(numbers) * 9 // 10
    source = f"the Python {'.'.join(platform.python_version_tuple()[:2])} language reference (pydoc_data.topics)"
    return Corpus(alphabet, numbers[:cut], numbers[cut:], source)


def count_model_bits(train: np.ndarray, test: np.ndarray, order: int, characters: int) -> float:
    """Return the bits per character of an n-gram count model of the test text.

    A character's probability mixes the counts after the last `order - 1` characters with those after fewer, down to none
    (Witten-Bell smoothing: the shorter contexts weigh as much as different characters were seen after the longer one).

    Args:
        train: numbers of the text to count in.
        test: numbers of the text to predict; its first `order - 1` characters are only looked back at.
        order: characters of the longest n-gram.
        characters: size of the alphabet; `characters ** order` must stay below 2^63.

    Raises:
        ValueError: if the n-grams do not fit into 63 bits.
    """
    if order * math.log2(characters) >= 63:
        raise ValueError(f"order: expected n-grams below 2^63, got {characters}^{order}")
    chance = np.full(len(test) - order + 1, 1 / characters)
    for length in range(1, order + 1):
        grams, counts = np.unique(_grams(train, length, characters), return_counts=True)
        contexts, start, kinds = np.unique(grams // characters, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, start)
        asked = _grams(test, length, characters)[order - length :]
        seen = _find(grams, counts, asked)
        total, different = _find(contexts, totals, asked // characters), _find(contexts, kinds, asked // characters)
        known = total > 0
        chance[known] = (seen + different * chance)[known] / (total + different)[known]
    return float(-np.log2(chance).mean())


def _grams(text: np.ndarray, length: int, characters: int) -> np.ndarray:
    """Return every `length` successive characters as one number, the last character its lowest digit."""
    windows = np.lib.stride_tricks.sliding_window_view(text, length)
    return windows @ characters ** np.arange(length - 1, -1, -1, dtype=np.int64)


def _find(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the value of each wanted key, 0 where there is none; the keys are sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
