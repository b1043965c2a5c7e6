"""Every check of the batteries fails on the defect that it is there for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phyla.shared import testing
from phyla.shared.kernels import Kernel

X, W = torch.linspace(-2, 2, 12, dtype=torch.float64).view(4, 3), torch.tensor(1.5, dtype=torch.float64)
_names = itertools.count()


def right(x: Tensor, w: Tensor) -> Tensor:
    return w * x**3


def right_backward(grad: Tensor, x: Tensor, w: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    return 3 * w * x**2 * grad, (grad * x**3).sum()


def empty(x: Tensor, w: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def broken(
    forward: Callable[..., Tensor] = right,
    backward: Callable[..., Any] = right_backward,
    composite: Callable[..., Tensor] = right,
    fake: Callable[..., Tensor] = empty,
) -> testing._Case:
    """The cubic kernel with hand-written CPU parts of which one is wrong."""
    kernel = Kernel(f"phyla_broken{next(_names)}::cubic(Tensor x, Tensor w) -> Tensor", composite, differentiable=("x", "w"), fake=fake)
    kernel._library.impl("cubic", forward, "CPU")
    kernel._library.impl("cubic_backward", backward, "CPU")
    return testing._Case(kernel, (X, W), None, (0,))


def branching(x: Tensor, w: Tensor) -> Tensor:
    return w * x**3 if float(x.detach().sum()) > -1e9 else x


def ignoring_strides(x: Tensor, w: Tensor) -> Tensor:
    return right(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()), w)


def afraid_of_nothing(x: Tensor, w: Tensor) -> Tensor:
    if x.numel() == 0:
        raise RuntimeError("empty")
    return right(x, w)


def sum_by_thread(grad: Tensor, x: Tensor, w: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    parts = (grad * x**3).flatten().chunk(torch.get_num_threads() * 7)
    return 3 * w * x**2 * grad, torch.stack([p.sum() for p in parts]).sum()


def specialised(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(int(x.shape[0]), *x.shape[1:])


KERNEL_DEFECTS: dict[str, tuple[Callable[[testing._Case], None], Callable[[], testing._Case]]] = {
    "wrong value": (testing.kernel_parity, lambda: broken(forward=lambda x, w: right(x, w) * 1.0001)),
    "composite unlike the reference": (
        lambda case: testing.kernel_parity(testing._Case(case.kernel, case.args, lambda x, w: w * x**2, (0,))),
        broken,
    ),
    "wrong gradient": (testing.kernel_gradcheck, lambda: broken(backward=lambda g, x, w, n: (3 * w * x * x * g * 1.01, (g * x**3).sum()))),
    "composite that no transform enters": (testing.kernel_transforms, lambda: broken(composite=branching)),
    "fake of another shape": (testing.kernel_opcheck, lambda: broken(fake=lambda x, w: x.new_empty(1))),
    "fake of another dtype": (testing.kernel_compile, lambda: broken(fake=lambda x, w: x.new_empty(1, dtype=torch.int64))),
    "fake that fixes the batch": (testing.kernel_export, lambda: broken(fake=specialised)),
    "NaN repaired": (testing.kernel_nan, lambda: broken(forward=lambda x, w: right(x, w).nan_to_num())),
    "sum that depends on the threads": (testing.kernel_threads, lambda: broken(backward=sum_by_thread)),
    "strides ignored": (testing.kernel_layouts, lambda: broken(forward=ignoring_strides)),
    "no empty batch": (testing.kernel_empty, lambda: broken(forward=afraid_of_nothing)),
}


@pytest.mark.parametrize("defect", KERNEL_DEFECTS)
def test_kernel_check_sees(defect: str) -> None:
    check, make = KERNEL_DEFECTS[defect]
    with pytest.raises(Exception):  # noqa: B017, PT011  torch's own checkers raise exceptions of many types
        check(make())


@pytest.mark.parametrize("check", sorted({c.__name__ for c, _ in KERNEL_DEFECTS.values()} - {"<lambda>"}))
def test_kernel_check_passes_the_right_kernel(check: str) -> None:
    getattr(testing, check)(broken())


class Good(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight).tanh()


class Forgetful(Good):
    """Its function depends on what the state dict does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = float(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


class Detached(Good):
    """A false second derivative: part of the first one is cut."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * y.detach()


class Breaking(Good):
    """Dynamo cannot see through it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if float(x.sum()) > 1e9 else 1.0)


class OnlySingle(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Aliased(Good):
    """Keeps a second reference to its parameter, which sharding does not replace."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.alias[0]).tanh()


MODULE_DEFECTS: dict[str, tuple[Callable[..., None], type[nn.Module]]] = {
    "state outside the state dict": (testing.module_state, Forgetful),
    "cut gradient": (testing.module_transforms, Detached),
    "graph break": (testing.module_compile, Breaking),
    "one precision only": (testing.module_precision, OnlySingle),
    "aliased parameter": (testing.module_distributed, Aliased),
}


@pytest.mark.parametrize("defect", MODULE_DEFECTS)
def test_module_check_sees(defect: str) -> None:
    check, module = MODULE_DEFECTS[defect]
    with pytest.raises(Exception):  # noqa: B017, PT011
        check(module, (torch.randn(4, 3),))


def test_module_battery_passes_a_good_module() -> None:
    testing.check_module(Good, torch.randn(4, 3))
    testing.check_module(Breaking, torch.randn(4, 3), without={"module_compile": "breaks the graph", "module_transforms": "reads a value"})
    with pytest.raises(ValueError, match="without: expected names among"):
        testing.check_module(Good, torch.randn(4, 3), without={"module_nonsense": "no reason"})


def test_fuzz_sees_undocumented_errors() -> None:
    def crashes(x: Any) -> Tensor:
        if x is None:
            raise AttributeError("no shape")
        return torch.zeros(1)

    with pytest.raises(AttributeError):
        testing.fuzz(crashes, X)


def test_golden_files_are_read_into_tensors(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", x=np.arange(3.0), option=np.array("sum_abs"), degree=np.array(5))
    golden = testing.load_golden(tmp_path / "g.npz")
    assert torch.equal(golden["x"], torch.arange(3.0, dtype=torch.float64))
    assert testing.golden_text(golden["option"]) == "sum_abs"
    assert int(golden["degree"]) == 5


def test_assert_close_names_what_differs() -> None:
    with pytest.raises(AssertionError, match=r"y: differs by 0\.5 of the largest entry, allowed 0.1"):
        testing.assert_close("y", torch.tensor([1.0]), torch.tensor([2.0]), 0.1)
    with pytest.raises(AssertionError, match="NaN in other places"):
        testing.assert_close("y", torch.tensor([float("nan")]), torch.tensor([2.0]), 0.1)
    with pytest.raises(AssertionError, match="expected shape"):
        testing.assert_close("y", torch.ones(2), torch.ones(3), 0.1)


def test_an_example_runs_as_a_script_and_leaves_the_threads(tmp_path: Path) -> None:
    threads, script = torch.get_num_threads(), tmp_path / "script.py"
    script.write_text(f"import torch\ntorch.set_num_threads({threads + 1})\nprint(__name__, torch.get_num_threads())\n")
    assert testing.run_example(script) == f"__main__ {threads + 1}\n"
    assert torch.get_num_threads() == threads
