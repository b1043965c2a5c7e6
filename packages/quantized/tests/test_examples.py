"""The examples run as they stand, and print what they found."""

import re
from pathlib import Path

import pytest

from phyla.shared.testing import run_example

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name: str) -> None:
    printed = run_example(EXAMPLES / name)
    assert printed
    if name == "train_binary.py":
        accuracies = [float(found) for found in re.findall(r"accuracy (0\.\d+|1\.0+)", printed)]
        assert len(accuracies) == 3
        assert min(accuracies[0], accuracies[2]) > 0.9, "a binary network reads digits"
