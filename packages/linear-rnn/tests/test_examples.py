"""The examples run as they stand and find what they say."""

from pathlib import Path

from phyla.shared.testing import run_example

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_no_example_is_left_out():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"state_tracking.py", "packed_streaming.py"}


def test_state_tracking():
    lines = run_example(EXAMPLES / "state_tracking.py").splitlines()
    assert lines[0] == "reflections of each element of S3: [0, 1, 1, 2, 2, 1]"
    accuracy = {int(line.split()[1].rstrip(":")): float(line.split()[2]) for line in lines if line.startswith("length")}
    assert list(accuracy) == [32, 64, 128, 256]
    assert accuracy[32] > 99
    assert accuracy[64] > 97


def test_packed_streaming():
    lines = run_example(EXAMPLES / "packed_streaming.py").splitlines()
    assert len(lines) == 4
    assert all(line.endswith("the same as alone: True") for line in lines)
