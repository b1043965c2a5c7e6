"""The jobs of the house. Plain `nox` runs lint, types, all tests and integration; `nox -l` lists the others.

Packages are found by their pyproject.toml: nothing is edited here when one is added. Every session but lint sees wheels only. A wheel is
built once, into .nox/wheels, and again when its sources changed; third-party versions are those of uv.lock.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "types", "test", "integration"]

ROOT = Path(__file__).parent
WORK = ROOT / ".nox"
PACKAGES = {file.parent.name: file.parent for file in [ROOT / "shared" / "pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]}
PROJECTS = {name: nox.project.load_toml(folder / "pyproject.toml") for name, folder in PACKAGES.items()}
LIST_NAMESPACE = "import phyla, pkgutil; print(*sorted(module.name for module in pkgutil.iter_modules(phyla.__path__)))"


def found(version: str) -> bool:
    """Whether this Python runs on this machine; a shim of a version manager may exist and yet not run."""
    python = shutil.which(f"python{version}")
    return python is not None and subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
OTHERS = [version for version in ("3.12", "3.13") if version != RUNNING and found(version)]
TESTS = {package: (None, package) for package in PACKAGES} | {
    f"{package}-{version}": (version, package) for version in OTHERS for package in PACKAGES
}


def kernel_tests(name: str) -> list[str]:
    """The package's test files that put kernels through the battery, or ops that nothing differentiates through torch's check."""
    folder, checks = PACKAGES[name], ("check_kernel", "opcheck")
    files = sorted((folder / "tests").rglob("test_*.py"))
    return [str(file.relative_to(folder)) for file in files if any(check in file.read_text() for check in checks)]


WITH_KERNELS = [name for name in PACKAGES if kernel_tests(name)]


def needs(name: str) -> list[str]:
    """The package and every phyla package that it depends on, the deepest first."""
    required = {Requirement(line).name for line in PROJECTS[name]["project"]["dependencies"]}
    return list(dict.fromkeys([*(deep for other in PACKAGES if f"phyla-{other}" in required for deep in needs(other)), name]))


@functools.cache
def constraints() -> Path:
    """The third-party versions of uv.lock."""
    file = WORK / "constraints.txt"
    WORK.mkdir(exist_ok=True)
    export = ["uv", "export", "--frozen", "--all-packages", "--all-groups", "--all-extras", "--no-emit-workspace", "--no-hashes"]
    subprocess.run([*export, "--quiet", "--output-file", str(file)], cwd=ROOT, check=True)
    return file


@functools.cache
def wheel(name: str, sanitized: bool = False) -> Path:
    """The package's wheel, built if its sources, or those of phyla-shared that compiles it, are new."""
    folder = WORK / "wheels" / (f"{name}-sanitized" if sanitized else name)
    files = [file for part in {"shared", name} for file in [PACKAGES[part] / "pyproject.toml", *(PACKAGES[part] / "src").rglob("*")]]
    sources = sorted(file for file in files if file.is_file() and file.suffix in {".py", ".cpp", ".h", ".toml", ".typed"})
    content = b"".join(str(file).encode() + file.read_bytes() for file in sources)
    digest = hashlib.sha256(content + os.environ.get("PHYLA_NATIVE", "").encode()).hexdigest()
    stamp = folder / "sources.sha256"
    if not stamp.exists() or stamp.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        build = ["uv", "build", "--wheel", "--package", f"phyla-{name}", "--out-dir", str(folder), "--python", sys.executable]
        environment = os.environ | ({"PHYLA_SANITIZE": "1"} if sanitized else {})
        subprocess.run([*build, "--build-constraints", str(constraints())], cwd=ROOT, env=environment, check=True)
        stamp.write_text(digest)
    return next(folder.glob("*.whl"))


def groups(names: Iterable[str], group: str) -> list[str]:
    """The requirements of a dependency group of these packages."""
    return [
        item
        for name in names
        if group in PROJECTS[name].get("dependency-groups", {})
        for item in nox.project.dependency_groups(PROJECTS[name], group)
    ]


def install(session: nox.Session, names: Iterable[str], *more: str, sanitized: bool = False) -> None:
    """Install the wheels of these packages and of what they need, nothing from the source tree."""
    every = dict.fromkeys(need for name in names for need in needs(name))
    wheels = [str(wheel(name, sanitized)) for name in every]
    session.install("--constraint", str(constraints()), *wheels, *more)
    expected = sorted(name.replace("-", "_") for name in every)
    with tempfile.TemporaryDirectory() as empty, session.chdir(empty):
        importable = session.run("python", "-c", LIST_NAMESPACE, silent=True)
    if str(importable).split() != expected:
        session.error(f"importable from phyla: {importable}, expected {expected}")


def pytest(session: nox.Session, name: str, *args: str, **env: str) -> None:
    """Run pytest on a copy of the package's tests, examples and benchmarks, far from the source tree."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / name
        copy.mkdir()
        for part in {"tests", "examples", "benchmarks"} & {entry.name for entry in PACKAGES[name].iterdir()}:
            shutil.copytree(PACKAGES[name] / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        with session.chdir(copy):
            command = ["python", "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(copy), *args]
            nothing_chosen = 5  # pytest's exit code where the caller's arguments choose no test of this package
            session.run(*command, env=env, success_codes=[0, nothing_chosen] if session.posargs else [0])


@nox.session
def lint(session: nox.Session) -> None:
    """ruff check and ruff format --check."""
    session.install("--constraint", str(constraints()), "ruff")
    session.run("ruff", "check", str(ROOT))
    session.run("ruff", "format", "--check", str(ROOT))


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on all sources, and on a consumer that sees only the wheels."""
    install(session, PACKAGES, "mypy", "nox", "scipy-stubs", *groups(PACKAGES, "test"))
    sources = [str(folder / "src") for folder in PACKAGES.values()] + [str(ROOT / "tests-integration")]
    session.run("mypy", "--strict", *sources, str(ROOT / "noxfile.py"), env={"MYPYPATH": os.pathsep.join(sources)})
    with tempfile.TemporaryDirectory() as temporary:
        consumer = shutil.copy(ROOT / "tests-integration" / "consumer.py", temporary)
        with session.chdir(temporary):
            session.run("mypy", "--strict", consumer)
            session.run("python", consumer)


@nox.session
@nox.parametrize(["python", "package"], list(TESTS.values()), ids=list(TESTS))
def test(session: nox.Session, package: str) -> None:
    """The package's tests against its wheel alone: no other phyla package can be imported. Arguments go to pytest."""
    install(session, [package], *groups([package], "test"))
    pytest(session, package, "tests", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """The rules of the house and what crosses packages, against all wheels. Arguments go to pytest."""
    install(session, PACKAGES, *groups(PACKAGES, "test"))
    session.run("python", "-m", "pytest", "tests-integration", *session.posargs)


@nox.session
@nox.parametrize("package", WITH_KERNELS, ids=WITH_KERNELS)
def sanitize(session: nox.Session, package: str) -> None:
    """The tests of a package's kernels, with the native kernels built under the address and undefined-behaviour sanitizers."""
    locate = [["gcc", f"-print-file-name={runtime}"] for runtime in ("libasan.so", "libubsan.so")]
    runtimes = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in locate]
    settings = {
        "PHYLA_SANITIZE": "1",  # for the kernels that tests compile themselves
        "PHYLA_NATIVE": "require",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    install(session, [package], *groups([package], "test"), sanitized=True)
    pytest(session, package, *kernel_tests(package), *session.posargs, **settings)


@nox.session
def bench(session: nox.Session) -> None:
    """Every benchmark of every package beside its peers. Arguments go to the scripts: `nox -s bench -- --only rational --threads 1`."""
    install(session, PACKAGES, *groups(PACKAGES, "bench"))
    for script in sorted(ROOT.glob("packages/*/benchmarks/bench_*.py")):
        session.run("python", str(script), *session.posargs)


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """All wheels and sdists into dist/; then each of them, alone, into an empty environment with plain pip."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("uv", "build", "--all-packages", "--out-dir", str(ROOT / "dist"), "--python", sys.executable)
    for name in PACKAGES:
        with tempfile.TemporaryDirectory() as temporary, session.chdir(temporary):
            session.run(sys.executable, "-m", "venv", "env")
            python = str(Path(temporary) / "env" / "bin" / "python")
            session.run(python, "-m", "pip", "install", "--quiet", "--find-links", str(ROOT / "dist"), f"phyla-{name}")
            session.run(python, "-c", f"import phyla.{name.replace('-', '_')}")
            for command in PROJECTS[name]["project"].get("scripts", {}):
                session.run(str(Path(python).parent / command), "list")
