"""The examples run as they stand, and print what they found."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def threads() -> Iterator[None]:
    """An example may set the number of threads; put it back."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    if name == "train_binary.py":
        accuracies = [float(found) for found in re.findall(r"accuracy (0\.\d+|1\.0+)", printed)]
        assert len(accuracies) == 3
        assert min(accuracies[0], accuracies[2]) > 0.9, "a binary network reads digits"
