from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from phyla.shared import build


def hook(package: Path) -> tuple[build.NativeBuildHook, dict[str, Any]]:
    made: Any = build.NativeBuildHook
    return made(str(package), {}, None, None, "", "wheel"), {"force_include": {}}


def test_wheel_carries_the_library_and_a_platform_tag(selftest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHYLA_NATIVE", "require")
    made, data = hook(selftest)
    made.initialize("standard", data)
    assert list(data["force_include"].values()) == ["phyla/selftest/kernels/_native.so"]
    assert data["tag"].startswith("py3-none-")
    assert not data["pure_python"]


def test_off_builds_a_pure_wheel(selftest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHYLA_NATIVE", "off")
    made, data = hook(selftest)
    made.initialize("standard", data)
    assert data == {"force_include": {}}


def test_without_a_compiler_it_warns_and_requires_only_when_asked(selftest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PHYLA_NATIVE", "")
    made, data = hook(selftest)
    with pytest.warns(UserWarning, match="building without native kernels: no C\\+\\+ compiler"):
        made.initialize("standard", data)
    monkeypatch.setenv("PHYLA_NATIVE", "require")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        made.initialize("standard", data)


def test_compiler_errors_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "phyla" / "wrong" / "kernels"
    folder.mkdir(parents=True)
    (folder / "wrong.cpp").write_text("int f() { return undeclared; }")
    with pytest.raises(build.BuildError, match="undeclared"):
        build.compile_kernels(tmp_path, tmp_path / "lib.so")
    assert not (tmp_path / "lib.so").exists()


def test_a_package_without_kernels_is_left_alone(tmp_path: Path) -> None:
    made, data = hook(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.initialize("standard", data)
    assert data == {"force_include": {}}
    with pytest.raises(build.BuildError, match="no src/phyla"):
        build.compile_kernels(tmp_path, tmp_path / "lib.so")


def test_command_line_builds_in_place_and_reuses_objects(selftest: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(selftest, package, ignore=shutil.ignore_patterns("*.so", "build"))
    command = [sys.executable, "-m", "phyla.shared.build", str(package)]
    subprocess.run(command, check=True, capture_output=True)
    (first,) = (package / "build" / "native").glob("cubic-*.o")
    stamp = first.stat().st_mtime_ns
    subprocess.run(command, check=True, capture_output=True)
    assert first.stat().st_mtime_ns == stamp
    assert (package / "src" / "phyla" / "selftest" / "kernels" / "_native.so").exists()
