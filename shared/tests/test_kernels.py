from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from phyla.shared import checks
from phyla.shared.kernels import Kernel, Op, status
from phyla.shared.testing import check_kernel, fuzz

X, W = torch.linspace(-2, 2, 12, dtype=torch.float64).view(4, 3), torch.tensor(1.5, dtype=torch.float64)


def test_native_kernel_passes_the_battery(cubic: Kernel) -> None:
    assert cubic.native
    check_kernel(cubic, X, W, reference=lambda x, w: w * x * x * x)


def test_composite_alone_passes_the_battery() -> None:
    kernel = Kernel(
        "phyla_plain::scale(Tensor x, Tensor? w, str how, float[] by) -> Tensor",
        lambda x, w, how, by: x.sin() * (by[0] if w is None else w) if how == "sin" else x,
        differentiable=("x", "w"),
        fake=lambda x, w, how, by: torch.empty_like(x, memory_format=torch.contiguous_format),
    )
    assert not kernel.native
    check_kernel(kernel, X, W, "sin", [2.0])
    check_kernel(kernel, X, None, "sin", [2.0])


def test_several_outputs_pass_the_battery() -> None:
    kernel = Kernel(
        "phyla_plain::polar(Tensor r, Tensor angle) -> (Tensor, Tensor)",
        lambda r, angle: (r * angle.cos(), r * angle.sin()),
        differentiable=("r", "angle"),
        fake=lambda r, angle: (torch.empty_like(r), torch.empty_like(r)),
    )
    check_kernel(kernel, X, X.flip(0).clone(), batch=(0, 1))


def test_an_op_without_gradients_keeps_its_dtypes_and_compiles() -> None:
    count = Op(
        "phyla_plain::count_negative(Tensor x, Tensor weight) -> Tensor",
        lambda x, weight: ((x < 0) * weight).sum(-1, dtype=torch.int32),
        fake=lambda x, weight: x.new_empty(x.shape[:-1], dtype=torch.int32),
    )
    weight = torch.ones(3, dtype=torch.int64)
    assert not count.native
    assert torch.equal(count(X, weight), (X < 0).sum(-1, dtype=torch.int32))
    assert torch.equal(torch.compile(count, fullgraph=True)(X, weight), count(X, weight))
    torch.library.opcheck(count.op, (X, weight))
    with pytest.raises(ValueError, match=r"weight: expected a tensor on cpu, got one on meta"):
        count(X, weight.to("meta"))


def test_only_the_arguments_are_saved(cubic: Kernel) -> None:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x, w = X.float().requires_grad_(), W.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        cubic(x, w)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), w.data_ptr()}


def test_autocast_casts_the_named_arguments_only(cubic: Kernel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = cubic(X.float(), W.float())
    assert out.dtype == torch.bfloat16
    expected = (W * X.bfloat16().double() ** 3).bfloat16()
    assert torch.equal(out, expected)


def test_third_derivative(cubic: Kernel) -> None:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(cubic(x, W).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    assert torch.allclose(third, torch.full_like(X, 9.0))


def test_one_tensor_given_twice_compiles(cubic: Kernel) -> None:
    w = W.clone().requires_grad_()
    compiled = torch.compile(lambda w: cubic(w, w), fullgraph=True, backend="aot_eager")
    compiled(w).backward()
    assert w.grad is not None
    assert torch.allclose(w.grad, 4 * W**3)


def test_fuzz_of_a_checked_function(cubic: Kernel) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        checks.floating("x", x)
        checks.floating("w", w)
        checks.shape("w", w, ())
        checks.same("w", w, "x", x)
        out: Tensor = cubic(x, w)
        return out

    fuzz(function, X, W)


def test_unknown_argument_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected names among \['x'\], got \['y'\]"):
        Kernel("phyla_plain::broken(Tensor x) -> Tensor", lambda x: x, differentiable=("y",), fake=lambda x: x)


def test_status_tells_native_and_composite(cubic: Kernel) -> None:
    report = status()
    assert report["phyla.selftest"].native
    assert report["phyla.selftest"].ops == ("cubic",)


PROGRAM = """
import torch
from phyla.shared.kernels import Kernel, Op, status
k = Kernel("phyla_selftest::cubic(Tensor x, Tensor w) -> Tensor", lambda x, w: w * x**3, differentiable=("x", "w"), fake=lambda x, w: x)
print(status()["phyla.selftest"].reason, float(k(torch.tensor(2.0), torch.tensor(3.0))))
"""


def run(mode: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, folders))
    env = {**os.environ, "PHYLA_NATIVE": mode, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)


def test_native_modes(selftest: Path, tmp_path: Path) -> None:
    built, empty = selftest / "src", tmp_path / "src"
    (empty / "phyla" / "selftest" / "kernels").mkdir(parents=True)
    assert run("", built).stdout.strip() == "native 24.0"
    assert run("off", built).stdout.strip() == "composite: PHYLA_NATIVE=off 24.0"
    assert run("", empty).stdout.strip() == "composite: built without a native library 24.0"
    assert "built without its native library" in run("require", empty).stderr
    assert "PHYLA_NATIVE: expected 'off', 'require' or nothing, got 'yes'" in run("yes", built).stderr


def test_a_broken_library_is_reported(selftest: Path, tmp_path: Path) -> None:
    broken = tmp_path / "src"
    kernels = broken / "phyla" / "selftest" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "_native.so").write_bytes(b"not a library")
    assert run("", broken).stdout.startswith("composite: the native library does not load")
    assert run("require", broken).returncode != 0


def test_no_wrong_dtype_or_device_reaches_native_code(cubic: Kernel) -> None:
    with pytest.raises(TypeError, match=r"w: expected a floating-point tensor, got torch\.bool"):
        cubic(X, torch.tensor(True))
    with pytest.raises(ValueError, match="w: expected a tensor on cpu, got one on meta"):
        cubic(X, W.to("meta"))
