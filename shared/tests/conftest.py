from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phyla.shared import build
from phyla.shared.kernels import Kernel

SELFTEST = Path(__file__).parent / "selftest"


@pytest.fixture(scope="session")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package `phyla.selftest` with one native kernel, compiled once and importable."""
    package = tmp_path_factory.mktemp("selftest") / "package"
    shutil.copytree(SELFTEST, package, ignore=shutil.ignore_patterns("build", "*.so"))
    folder = build.kernel_folder(package)
    assert folder is not None
    build.compile_kernels(package, folder / build.LIBRARY)
    sys.path.append(str(package / "src"))
    return package


@pytest.fixture(scope="session")
def cubic(selftest: Path) -> Kernel:
    return make_cubic("phyla_selftest")


def make_cubic(namespace: str, composite: Callable[..., torch.Tensor] = lambda x, w: w * x**3, **options: object) -> Kernel:
    given: dict[str, object] = {"fake": lambda x, w: torch.empty_like(x, memory_format=torch.contiguous_format), **options}
    return Kernel(
        f"{namespace}::cubic(Tensor x, Tensor w) -> Tensor",
        composite,
        differentiable=("x", "w"),
        autocast=("x",),
        **given,  # type: ignore[arg-type]
    )
