"""Side-by-side timing: this against its peers in one run, peak memory of each, and how far from the machine's floor.

A benchmark script declares cases and calls `main`; `python bench_rational.py --threads 1 --only 4096` runs it:

    from phyla.shared.bench import Case, Step, main

    def ours() -> Step:                             # builds the state once, gives back the step that is timed
        x = torch.randn(4096, 768)
        return lambda: rational(x, numerator, denominator)

    def official() -> Step: ...

    CASES = [
        Case("rational 4096 x 768", {"phyla": ours, "official torch path": official}, flops=60e6, bytes=2 * 4 * 4096 * 768, target=8.0),
    ]

    if __name__ == "__main__":                      # needed: peak memory is measured in fresh processes that import the script
        main(CASES)

The builders must be module-level functions, or `functools.partial`s of such, since a fresh process has to find them.
"""

import argparse
import ctypes
import functools
import gc
import json as jsonlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

__all__ = ["Case", "Result", "Step", "Timing", "compare", "main", "measure", "peak_memory", "show"]

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One question: how fast is the first of `build` beside the others?

    Args:
        name: what is computed, with its sizes.
        build: a builder for each contestant, ours first, then the peers. A builder makes inputs and modules and returns the step to time.
        flops: floating point operations of one step, multiplications and additions counted apart.
        bytes: the fewest bytes that one step must move: every input read once, every output written once.
        target: the wanted ratio of the first peer's time to ours.
    """

    name: str
    build: Mapping[str, Callable[[], Step]]
    flops: float = 0.0
    bytes: float = 0.0
    target: float | None = None


@dataclass(frozen=True)
class Timing:
    """One contestant. Times in seconds a step, medians over the rounds; spreads are interquartile ranges.

    `ratio` is the median over rounds of this time to ours (1 for ours), `floor` that of this time to the machine's least time, None where
    the case declares no work. `memory` is the growth of the peak resident bytes in one step over the built state, None without /proc.
    """

    name: str
    seconds: float
    spread: float
    ratio: float
    ratio_spread: float
    floor: float | None
    memory: int | None


@dataclass(frozen=True)
class Result:
    """The timings of one case, ours first; `met` tells whether the target was reached, None where there is none."""

    case: str
    threads: int
    rounds: int
    timings: list[Timing]
    target: float | None
    met: bool | None


def compare(
    cases: Sequence[Case],
    *,
    threads: int = 2,
    repeats: int = 20,
    min_time: float = 0.02,
    max_time: float = 60.0,
    memory: bool = True,
    json: str | Path | None = None,
) -> list[Result]:
    """Measure each case, print its table as soon as it is known, and write all of them to `json`.

    Args:
        threads: torch threads of every contestant.
        repeats: rounds; in each one every contestant runs once, in turn, so that a slow moment of the machine hits all of them.
        min_time: seconds that a contestant runs in a round, by repeating a quick step.
        max_time: seconds for one case: fewer rounds, never under three, are run where steps are slow.
        memory: whether to measure peak memory too; it starts one fresh process a contestant.
        json: file for the results and a description of the machine.

    Returns: one Result a case.
    Raises: ImportError without rich (`pip install 'phyla-shared[bench]'`).
    """
    results = []
    for case in cases:
        results.append(measure(case, threads=threads, repeats=repeats, min_time=min_time, max_time=max_time, memory=memory))
        show(results[-1])
    if json is not None:
        machine = {"platform": platform.platform(), "processor": platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__}
        Path(json).write_text(jsonlib.dumps({"machine": machine, "results": [asdict(result) for result in results]}, indent=2) + "\n")
    return results


def measure(
    case: Case, *, threads: int = 2, repeats: int = 20, min_time: float = 0.02, max_time: float = 60.0, memory: bool = True
) -> Result:
    """Measure one case without printing; the arguments are those of `compare`."""
    with _threads(threads):
        ceilings = _ceilings(case)
        steps = [build() for build in case.build.values()] + [step for step, _ in ceilings]
        for step in steps:
            step()
        loops = [math.ceil(min_time / _seconds(step, 1)) for step in steps]
        cost = sum(_seconds(step, loop) * loop for step, loop in zip(steps, loops, strict=True))
        rounds = max(min(3, repeats), min(repeats, int(max_time / cost)))
        times = [[_seconds(step, loop) for step, loop in zip(steps, loops, strict=True)] for _ in range(rounds)]
        del steps
    n = len(case.build)
    # A round's floor is the time of its copy or of its matrix product, each scaled to the work of the case: the larger of the two.
    floors = [max((t * scale for t, (_, scale) in zip(row[n:], ceilings, strict=True)), default=math.nan) for row in times]
    timings = []
    for j, (name, build) in enumerate(case.build.items()):
        seconds, ratios = [row[j] for row in times], [row[j] / row[0] for row in times]
        floor = statistics.median(t / least for t, least in zip(seconds, floors, strict=True)) if ceilings else None
        peak = peak_memory(build, threads=threads) if memory else None
        timings.append(Timing(name, statistics.median(seconds), _spread(seconds), statistics.median(ratios), _spread(ratios), floor, peak))
    met = timings[1].ratio >= case.target if case.target is not None and n > 1 else None
    return Result(case.name, threads, rounds, timings, case.target, met)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """A number of torch threads, and no garbage collection in the middle of a step."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(before)


def _seconds(step: Step, loops: int) -> float:
    """Mean time of one step."""
    start = time.perf_counter()
    for _ in range(loops):
        step()
    return max(time.perf_counter() - start, 1e-9) / loops


def _spread(values: Sequence[float]) -> float:
    """Interquartile range."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (0.0, 0.0, 0.0)
    return high - low


def _ceilings(case: Case) -> list[tuple[Step, float]]:
    """What the machine can do at best: a copy that moves the case's bytes, a matrix product; each with its scale to the case's work."""
    ceilings: list[tuple[Step, float]] = []
    if case.bytes > 0:
        moved = 2 * min(math.ceil(case.bytes / 2), 1 << 27)
        source, target = torch.ones(moved // 2, dtype=torch.uint8), torch.zeros(moved // 2, dtype=torch.uint8)
        ceilings.append((functools.partial(target.copy_, source), case.bytes / moved))
    if case.flops > 0:
        size = 768
        a, b, c = (torch.ones(size, size) for _ in range(3))
        ceilings.append((functools.partial(torch.mm, a, b, out=c), case.flops / (2 * size**3)))
    return ceilings


def peak_memory(build: Callable[[], Step], *, threads: int = 2) -> int | None:
    """Growth of the peak resident bytes in one step, over the state that `build` and a first step left; in a fresh process.

    Returns: bytes, to about half a MiB; None where the system has no /proc/self/clear_refs.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_growth, build, threads).result()


def _growth(build: Callable[[], Step], threads: int) -> int:
    # Fixed thresholds (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD) make malloc give a large block back at once: resident bytes are live bytes.
    for option in (-3, -1):
        ctypes.CDLL(None).mallopt(option, 1 << 16)
    with _threads(threads):
        step = build()
        step()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
        before = _resident("VmHWM")
        step()
        return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def show(result: Result) -> None:
    """Print one result as a table."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("phyla.shared.bench prints its tables with rich: pip install 'phyla-shared[bench]'") from error
    reached = {None: "", True: f"; target {result.target} reached", False: f"; target {result.target} missed"}[result.met]
    table = Table(title=f"{result.case} ({result.threads} threads, {result.rounds} rounds{reached})", title_justify="left")
    for heading in ("", "time", "spread", f"ratio to {result.timings[0].name}", "spread", "times the floor", "peak memory"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in result.timings:
        floor = "-" if row.floor is None else f"{row.floor:.3g}"
        memory = "-" if row.memory is None else f"{row.memory / 2**20:.1f} MiB"
        table.add_row(
            row.name,
            f"{1e3 * row.seconds:.4g} ms",
            f"{1e3 * row.spread:.2g} ms",
            f"{row.ratio:.2f}",
            f"{row.ratio_spread:.2f}",
            floor,
            memory,
        )
    Console(width=max(120, Console().width)).print(table)


def main(cases: Sequence[Case]) -> list[Result]:
    """The command line of a benchmark script: `--threads`, `--repeats`, `--max-time`, `--only TEXT`, `--no-memory`, `--json FILE`."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch threads of every contestant")
    parser.add_argument("--repeats", type=int, default=20, help="rounds")
    parser.add_argument("--max-time", type=float, default=60.0, help="seconds for one case")
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    chosen = [case for case in cases if args.only in case.name]
    return compare(chosen, threads=args.threads, repeats=args.repeats, max_time=args.max_time, memory=not args.no_memory, json=args.json)
