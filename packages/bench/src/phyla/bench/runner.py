"""Runs pipelines one after the other and writes what they found; one that fails does not stop the others."""

import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, Protocol, TypeVar

from phyla.bench import pipelines, systems
from phyla.bench.results import Outcome, PipelineResult, Run
from phyla.bench.sandbox import Measured, Progress, run_fresh

T = TypeVar("T")
P = ParamSpec("P")


class Watcher(Protocol):
    """What the runner tells about its progress."""

    def pipeline(self, name: str) -> None:
        """A pipeline starts."""

    def trials(self, count: int) -> None:
        """The pipeline announces how many trials it is going to run."""

    def trial(self, label: str, share: float) -> None:
        """A trial is done to this share (1: it is finished)."""

    def outcome(self, outcome: Outcome) -> None:
        """A pipeline ended."""


@dataclass(frozen=True)
class Context:
    """What a pipeline gets: how much to do, with which seeds, and where to run it.

    Args:
        full: whether to run at full length; quick runs stay under about 40 seconds on two cores.
        seed: the first seed.
        threads: threads of torch in every trial.
        watcher: is told of the progress.
    """

    full: bool
    seed: int
    threads: int
    watcher: Watcher

    def pick(self, quick: T, full: T) -> T:
        """Return the value of this mode."""
        return full if self.full else quick

    def seeds(self, quick: int, full: int) -> tuple[int, ...]:
        """Return consecutive seeds, as many as this mode asks for."""
        return tuple(range(self.seed, self.seed + self.pick(quick, full)))

    def plan(self, trials: int) -> None:
        """Announce how many trials follow, for the progress display."""
        self.watcher.trials(trials)

    def trial(self, label: str, function: Callable[Concatenate[Progress, P], T], *args: P.args, **kwargs: P.kwargs) -> Measured[T]:
        """Run `function(progress, ...)` in a fresh process, show its progress, return its value and peak memory.

        Args:
            label: what is shown while it runs.
            function: a function of the pipeline's module; arguments and value must be picklable.

        Raises:
            TrialFailed: if the function raised or its process died.
        """
        self.watcher.trial(label, 0.0)

        def progress(share: float) -> None:
            self.watcher.trial(label, min(share, 0.99))

        measured = run_fresh(function, self.threads, progress, *args, **kwargs)
        self.watcher.trial(label, 1.0)
        return measured


def run(
    names: Sequence[str], *, full: bool, seed: int, threads: int, watcher: Watcher, keep: Callable[[Run], None] = lambda run: None
) -> tuple[Run, bool]:
    """Run pipelines in order.

    Args:
        names: pipelines to run.
        full: see `Context`; so `seed`, `threads`, `watcher`.
        keep: called with what is known after every pipeline, so that a later crash loses nothing.

    Returns:
        The run, and whether Ctrl-C ended it early.
    """
    started, clock = datetime.now().astimezone().isoformat(timespec="seconds"), time.perf_counter()
    outcomes: list[Outcome] = []
    interrupted = False
    mode: Literal["quick", "full"] = "full" if full else "quick"
    facts = environment(), versions(), kernels()

    def so_far() -> Run:
        return Run(started, time.perf_counter() - clock, mode, seed, threads, *facts, tuple(outcomes))

    try:
        for name in names:
            watcher.pipeline(name)
            outcome = _run_one(name, Context(full, seed, threads, watcher))
            outcomes.append(outcome)
            interrupted = outcome.status == "interrupted"
            keep(so_far())
            watcher.outcome(outcome)
            if interrupted:
                break
    except KeyboardInterrupt:  # between two pipelines
        interrupted = True
    return so_far(), interrupted


def _run_one(name: str, context: Context) -> Outcome:
    start = time.perf_counter()
    try:
        result = pipelines.load(name)(context)
        if not isinstance(result, PipelineResult):
            raise TypeError(f"pipeline {name}: expected run() to return a PipelineResult, got {type(result).__name__}")
    except KeyboardInterrupt:
        return Outcome(name, "interrupted", time.perf_counter() - start, error="stopped by Ctrl-C")
    except Exception:
        return Outcome(name, "failed", time.perf_counter() - start, error=traceback.format_exc())
    return Outcome(name, "passed", time.perf_counter() - start, result)


def environment() -> dict[str, str]:
    """Describe the machine, the system and Python, without naming the host or the user."""
    facts = {
        "processor": _processor(),
        "cores": str(usable_cores()),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    return {key: value for key, value in facts.items() if value}


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _memory() -> str:
    with suppress(OSError, ValueError, AttributeError):
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return ""


def versions() -> dict[str, str]:
    """Return the versions of all phyla packages and of what they compute with."""
    found = {systems.distribution(package): systems.version(package) for package in systems.packages()}
    for name in ("torch", "numpy", "scipy", "mlxtend", "matplotlib"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def kernels() -> dict[str, str]:
    """Return for every phyla package that has kernels whether they are native, and why; a package that cannot be imported says so."""
    from phyla.shared.kernels import status

    broken: dict[str, str] = {}
    for package in systems.packages():
        if package in ("bench", "shared"):
            continue
        try:
            import_module(f"phyla.{package}")
        except Exception as error:  # a broken package must not hide the results of the others
            broken[f"phyla.{package}"] = f"cannot be imported: {type(error).__name__}: {error}"
    return {name: _kernel_text(each.native, each.reason, each.ops) for name, each in status().items()} | broken


def _kernel_text(native: bool, reason: str, ops: Iterable[str]) -> str:
    return f"native: {', '.join(ops)}" if native else reason


def write_all(texts: Mapping[Path, str]) -> None:
    """Write several files so that each is either the old or the new one, never half of it.

    Raises:
        OSError: if one cannot be written; then none was replaced.
    """
    drafts: list[tuple[str, Path]] = []
    try:
        for path, text in texts.items():
            handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            drafts.append((draft, path))
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(draft, 0o666 & ~_umask())
        for _, path in drafts:
            if path.is_dir():
                raise IsADirectoryError(21, "is a folder", str(path))
        for draft, path in drafts:
            os.replace(draft, path)
    finally:
        for draft, _ in drafts:
            with suppress(FileNotFoundError):
                os.unlink(draft)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
