"""The hatchling build hook that compiles a package's ``kernels/*.cpp`` into its wheel, and ``python -m phyla.shared.build PACKAGE``.

The library needs torch's stable ABI only, no Python headers: one ``py3-none-<platform>`` wheel serves every Python and torch >= 2.10.
``PHYLA_NATIVE=off`` builds a pure wheel, ``PHYLA_NATIVE=require`` makes a failed build an error, ``PHYLA_SANITIZE=1`` builds with the
address and undefined-behaviour sanitizers, ``CXX`` names the compiler.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.plugin import hookimpl

LIBRARY = "_native.so"
_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Not -ffast-math: it drops NaN and inf, and linking with it switches the whole process to flush-to-zero.
_FAST = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"]
_SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-DPHYLA_NO_CLONES"]


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message is what the compiler said."""


def kernel_folder(package: Path) -> Path | None:
    """The folder ``src/phyla/<name>/kernels`` of the package at ``package``, or None if it has no native kernels."""
    return next((p.parent for p in sorted(package.glob("src/phyla/*/kernels/*.cpp"))), None)


def compile_kernels(package: Path, library: Path) -> None:
    """Compile every ``kernels/*.cpp`` of the package at ``package`` into ``library``; unchanged files are taken from ``build/native``.

    Raises:
        BuildError: no compiler, an uncovered platform, or a compiler error.
    """
    folder = kernel_folder(package)
    if folder is None:
        raise BuildError(f"{package}: no src/phyla/*/kernels/*.cpp")
    if sys.platform == "win32":
        raise BuildError("native kernels are not built on Windows")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler found (set CXX)")
    import torch

    torch_root = Path(torch.__file__).parent
    include = Path(__file__).parent / "include"
    flags = [*_FLAGS, *(_SANITIZE if os.environ.get("PHYLA_SANITIZE") == "1" else _FAST)]
    command = [compiler, *flags, f"-I{include}", f"-isystem{torch_root / 'include'}"]
    cache = package / "build" / "native"
    cache.mkdir(parents=True, exist_ok=True)
    headers = b"".join(p.read_bytes() for p in sorted([*folder.rglob("*.h"), *include.rglob("*.h")]))
    key = " ".join([compiler, *flags, torch.__version__]).encode() + headers  # not where torch is: isolated builds put it anywhere

    def compile_one(source: Path) -> Path:
        target = cache / f"{source.stem}-{hashlib.sha256(key + source.read_bytes()).hexdigest()[:16]}.o"
        if not target.exists():
            for stale in cache.glob(f"{source.stem}-*.o"):
                stale.unlink(missing_ok=True)
            part = target.with_suffix(f".{os.getpid()}.part")
            _run([*command, "-c", str(source), "-o", str(part)])
            part.replace(target)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = [str(o) for o in pool.map(compile_one, sorted(folder.glob("*.cpp")))]
    library.parent.mkdir(parents=True, exist_ok=True)
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch"]
    part = library.with_suffix(f".{os.getpid()}.part")
    _run([compiler, *flags, "-shared", *objects, *link, "-o", str(part)])
    part.replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


class NativeBuildHook(BuildHookInterface[BuilderConfig]):
    """Compiles the kernels when a wheel or an editable install is built."""

    PLUGIN_NAME = "phyla-native"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library; without one, warn and leave a pure wheel, unless ``PHYLA_NATIVE=require``."""
        mode = os.environ.get("PHYLA_NATIVE", "")
        package = Path(self.root)
        folder = kernel_folder(package)
        if self.target_name != "wheel" or folder is None or mode == "off":
            return
        editable = version == "editable"
        library = (folder if editable else package / "build") / LIBRARY
        try:
            compile_kernels(package, library)
        except BuildError as error:
            if mode == "require":
                raise
            warnings.warn(f"{package.name}: building without native kernels: {error}", stacklevel=2)
            return
        if not editable:
            build_data["force_include"][str(library)] = str(folder.relative_to(package / "src") / LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


@hookimpl
def hatch_register_build_hook() -> type[NativeBuildHook]:
    """Hatchling's entry point."""
    return NativeBuildHook


if __name__ == "__main__":
    for root in map(Path, sys.argv[1:]):
        target = kernel_folder(root)
        if target is not None:
            compile_kernels(root, target / LIBRARY)
            print(target / LIBRARY)
