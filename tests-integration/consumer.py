"""A program that uses the installed packages: it type-checks under mypy --strict, so their types are there and are not Any."""

from typing import assert_type

import torch
from torch import Tensor

from phyla.bench import Metric
from phyla.kan_family import KAN, Chebyshev, functional
from phyla.shared import checks
from phyla.shared.bench import Case, Result, Step, measure
from phyla.shared.kernels import Status, status

x = assert_type(checks.last_dim("x", torch.ones(2, 4), 4), Tensor)
assert_type(checks.choice("form", "a", ("a", "b")), str)

model = assert_type(KAN([4, 3, 1], basis=Chebyshev(5)), KAN)
assert_type(model.widths, tuple[int, ...])
assert_type(functional.rational(x, torch.ones(2, 4), torch.ones(2, 3)), Tensor)
assert_type(status(), dict[str, Status])
assert_type(Metric("error", better="lower"), Metric)


def predict() -> Step:
    """A step to time."""
    return lambda: model(x)


result = assert_type(measure(Case("predict", {"ours": predict}), repeats=2, memory=False), Result)
assert result.timings[0].seconds > 0
