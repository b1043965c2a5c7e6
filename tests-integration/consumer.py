"""A program that uses the installed packages: it type-checks under mypy --strict, so their types are there and are not Any."""

from typing import assert_type

import torch
from torch import Tensor

from phyla.shared import checks
from phyla.shared.bench import Case, Result, Step, measure


def square() -> Step:
    """A step to time."""
    x = torch.ones(8, 8)
    return lambda: x @ x


x = assert_type(checks.last_dim("x", torch.ones(2, 4), 4), Tensor)
assert_type(checks.choice("form", "a", ("a", "b")), str)
result = assert_type(measure(Case("square", {"ours": square}), repeats=2, memory=False), Result)
assert result.timings[0].seconds > 0
