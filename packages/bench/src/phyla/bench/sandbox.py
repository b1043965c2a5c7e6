"""Runs a function in a fresh process: a crash stays there, and its peak memory is its own.

The processes are forked from a server that has imported torch and the pipelines once but never computed anything, so that a fresh one costs
milliseconds. Where the platform has no such server they are spawned.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
Progress = Callable[[float], None]
"""What a sandboxed function calls with its progress between 0 and 1."""


class TrialFailed(RuntimeError):
    """A sandboxed function raised (the message carries its traceback) or its process died (the message names the signal)."""


@dataclass(frozen=True)
class Measured(Generic[T]):
    """A function's value and the peak of resident memory above the level at its start, in MiB (None where the system does not tell)."""

    value: T
    peak_mib: float | None


def run_fresh(
    function: Callable[Concatenate[Progress, P], T], threads: int, on_progress: Progress, /, *args: P.args, **kwargs: P.kwargs
) -> Measured[T]:
    """Call `function(progress, *args, **kwargs)` in a fresh process with `threads` threads of torch.

    Args:
        function: a function of an importable module; value and arguments must be picklable.
        threads: threads that torch may use there.
        on_progress: called here with the numbers that the function reports.

    Raises:
        TrialFailed: if the function raised or the process died.
    """
    from phyla.bench import pipelines

    # OpenMP's threads wait for each other by spinning for milliseconds, which costs whole time slices where a core is busy with
    # anything else (measured with two threads beside one busy process: 480 ms for a step of 8 ms, 7 ms with this shorter wait).
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        # The first optimizer of a process imports torch._dynamo, which takes seconds.
        context.set_forkserver_preload(["torch._dynamo", *(f"phyla.bench.pipelines.{name}" for name in pipelines.names())])
    ours, theirs = context.Pipe(duplex=False)
    payload = pickle.dumps((function, args, kwargs))
    process = context.Process(target=_child, args=(list(pipelines.__path__), payload, threads, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, value = ours.recv()
            if kind == "progress":
                on_progress(value)
            elif kind == "failed":
                raise TrialFailed(value)
            else:
                return Measured(*value)
    except EOFError:
        process.join()
        code = process.exitcode or 0
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise TrialFailed(f"{function.__module__}.{function.__qualname__}: the process died ({reason})") from None
    finally:
        if process.is_alive():
            process.terminate()
        process.join()
        ours.close()


def _child(paths: Sequence[str], payload: bytes, threads: int, connection: "Connection[Any, Any]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    try:
        import torch

        from phyla.bench import pipelines

        pipelines.__path__[:] = paths
        torch.set_num_threads(threads)
        function, args, kwargs = pickle.loads(payload)
        start = _reset_peak()
        value = function(lambda share: connection.send(("progress", share)), *args, **kwargs)
        peak = _peak_mib()
        connection.send(("done", (value, None if start is None or peak is None else max(0.0, peak - start))))
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(("failed", traceback.format_exc()))


def _reset_peak() -> float | None:
    """Make the kernel forget the peak so far where it can (Linux) and return the level now, in MiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_mib()


def _peak_mib() -> float | None:
    """Return the peak resident memory of this process in MiB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
