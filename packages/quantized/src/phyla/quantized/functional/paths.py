"""Which of the native paths does packed arithmetic: AVX-512 with VPOPCNTDQ, AVX2, or portable C++.

The widest one that the processor has is chosen when the library is loaded; the environment variable ``PHYLA_QUANTIZED_PATH`` set to
``avx512``, ``avx2`` or ``portable`` forces one.
"""

from __future__ import annotations

import os

import torch

from phyla.quantized.functional import bits as _loads_the_library  # noqa: F401
from phyla.shared import checks

PATHS = ("avx512", "avx2", "portable")


def kernel_path() -> str:
    """The path that packed arithmetic on CPU tensors takes: "avx512", "avx2", "portable", or "composite" without a native library."""
    if not hasattr(torch.ops.phyla_quantized, "use_path"):
        return "composite"
    name: str = torch.ops.phyla_quantized.use_path("")
    return name


def use_path(name: str) -> None:
    """Take the path ``name`` from now on, in the whole process.

    Raises:
        TypeError, ValueError: an unknown path, one that this processor or this build lacks, or no native library.
    """
    checks.choice("path", name, PATHS)
    if kernel_path() == "composite":
        raise ValueError(f"path: expected a native library for the path {name!r}, got composites only")
    try:
        torch.ops.phyla_quantized.use_path(name)
    except RuntimeError as error:
        raise ValueError(f"path: expected one that this machine runs, got {name!r}: {str(error).splitlines()[0]}") from error


if "PHYLA_QUANTIZED_PATH" in os.environ:
    try:
        use_path(os.environ["PHYLA_QUANTIZED_PATH"])
    except ValueError as error:
        raise ValueError(f"PHYLA_QUANTIZED_PATH: {error}") from None
