"""The examples run as they stand, and print what they found."""

from pathlib import Path

import pytest

from phyla.shared.testing import run_example

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name: str) -> None:
    printed = run_example(EXAMPLES / name)
    assert printed
    if name == "afkan_classifier.py":
        assert float(printed.split()[1]) > 0.9, "the spirals are told apart"
