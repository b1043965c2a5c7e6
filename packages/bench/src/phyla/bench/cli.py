"""The command `phyla`."""

import difflib
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from phyla.bench import compare as comparison
from phyla.bench import pipelines, report, runner
from phyla.bench.results import Board, Outcome, ResultsError, Run, read_run, to_json
from phyla.bench.systems import distribution, systems

app = typer.Typer(
    name="phyla",
    help="The integration benchmarks of the phyla packages on real data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
MAX_THREADS = 1024


def _stop(message: str) -> NoReturn:
    """End with one line on the error stream."""
    typer.echo(f"phyla: {' '.join(message.split())}", err=True)
    raise typer.Exit(BAD_INPUT)


def _integer(name: str, text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        _stop(f"{name}: expected an integer from {low} to {high}, got {text!r}")
    return value


@app.command("list")
def list_systems() -> None:
    """Show every system, its package, its entry points, its paper."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title, style in (("system", "bold"), ("package", "cyan"), ("entry points", ""), ("paper", "dim")):
        table.add_column(title, style=style, overflow="fold")
    try:
        found = systems()
    except ValueError as error:
        _stop(str(error))
    for system in found:
        table.add_row(*map(escape, (system.name, distribution(system.package), ", ".join(system.entry_points), system.paper)))
    console = Console()
    console.print(table)
    console.print(f"\n{len(found)} systems; pipelines for `phyla run`: {', '.join(pipelines.names())}", highlight=False, soft_wrap=True)


@app.command("run")
def run_pipelines(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[PIPELINE ...]", help="Pipelines to run; all of them when none is named.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="More seeds and longer training; without it a pipeline takes about 40 seconds.")
    ] = False,
    seed: Annotated[str, typer.Option(metavar="N", help="First seed of the repetitions.")] = "0",
    threads: Annotated[
        str | None, typer.Option(metavar="N", help="Threads of every trial; all usable cores by default.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for report.html and results.json.")] = Path("phyla-results"),
) -> None:
    """Run integration benchmarks on real data and write report.html and results.json."""
    chosen = _chosen(names or [])
    first_seed = _integer("--seed", seed, 0, 2**31 - 1)
    count = runner.usable_cores() if threads is None else _integer("--threads", threads, 1, MAX_THREADS)
    _require_writable(out)
    console = Console()
    with _live(console, len(chosen)) as watcher:
        result, interrupted = runner.run(
            chosen,
            full=full,
            seed=first_seed,
            threads=count,
            watcher=watcher,
            keep=lambda so_far: _write(out, {"results.json": to_json(so_far)}),
        )
    _write(out, {"results.json": to_json(result), "report.html": report.render(result)})
    for outcome in result.outcomes:
        _show(console, outcome)
    _summary(console, result, out, chosen)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if result.failed:
        raise typer.Exit(FAILED)


@app.command("report")
def render_report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.json", help="What `phyla run` wrote.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; report.html beside the results by default.", show_default=False)
    ] = None,
) -> None:
    """Render the report of a results file again."""
    run = _read(results)
    target = out or results.with_name("report.html")
    _require_writable(target.parent)
    _write(target.parent, {target.name: report.render(run)})
    Console().print(f"wrote {escape(str(target))}", highlight=False, soft_wrap=True)


@app.command("compare")
def compare_runs(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="The earlier results.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The later results.")],
) -> None:
    """Show what changed from one results file to another."""
    old, new = _read(before), _read(after)
    console = Console()
    settings = comparison.setting_changes(old, new)
    if settings:
        table = Table("setting", "before", "after", title="Different settings", box=None, padding=(0, 2, 0, 0), title_justify="left")
        for row in settings:
            table.add_row(*map(escape, row))
        console.print(table, "")
    found = comparison.changes(old, new)
    table = Table("pipeline", "task", "model", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("before", "after", "time", "memory"):
        table.add_column(title, justify="right")
    table.add_column("score")
    for each in found:
        cells = (each.pipeline, each.task, each.model, each.before, each.after)
        table.add_row(*map(escape, cells), _factor(each.step_ratio), _factor(each.memory_ratio), _VERDICTS[each.verdict])
    if found:
        console.print(table, "")
    counts = {verdict: sum(each.verdict == verdict for each in found) for verdict in _VERDICTS}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "nothing to compare", highlight=False)


_VERDICTS = {
    "better": "[green]better[/]",
    "worse": "[red]worse[/]",
    "same": "[dim]same[/]",
    "new": "[cyan]new[/]",
    "gone": "[yellow]gone[/]",
}


def _factor(ratio: float) -> str:
    if not math.isfinite(ratio):
        return ""
    colour = "red" if ratio > comparison.TIME_NOISE else "green" if ratio < 1 / comparison.TIME_NOISE else "dim"
    return f"[{colour}]x {ratio:.2f}[/]"


def _chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Return the pipelines to run, each once, or stop at an unknown name."""
    known = pipelines.names()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            _stop(f"unknown pipeline {name!r}{hint} (pipelines: {', '.join(known)})")
    return tuple(dict.fromkeys(names)) or known


def _read(path: Path) -> Run:
    try:
        return read_run(path)
    except ResultsError as error:
        _stop(str(error))


def _require_writable(folder: Path) -> None:
    """Create the folder and try a file in it, before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _stop(f"cannot write to the folder {folder}: {error.strerror or error}")


def _write(folder: Path, texts: dict[str, str]) -> None:
    try:
        runner.write_all({folder / name: text for name, text in texts.items()})
    except OSError as error:
        _stop(f"cannot write {', '.join(texts)} to {folder}: {error.strerror or error}")


class _Watcher:
    """Shows the run: a bar for all pipelines' trials, a line for each finished trial and pipeline."""

    def __init__(self, progress: Progress, pipeline_count: int) -> None:
        self.progress = progress
        self.count = pipeline_count
        self.started = 0
        self.name = ""
        self.finished = 0
        self.task = TaskID(0)

    def pipeline(self, name: str) -> None:
        self.name, self.finished = name, 0
        self.started += 1
        self.task = self.progress.add_task(f"[bold]{escape(name)}[/] [dim]{self.started}/{self.count}[/]", total=None, trial="")

    def trials(self, count: int) -> None:
        self.progress.update(self.task, total=count)

    def trial(self, label: str, share: float) -> None:
        self.progress.update(self.task, completed=self.finished + share, trial=escape(label))
        if share >= 1:
            self.finished += 1
            if not self.progress.console.is_terminal:  # a log gets a line where a terminal gets a moving bar
                count = self.progress.tasks[-1].total
                place = f"{self.finished}/{count:.0f}" if count else str(self.finished)
                self.progress.console.print(f"[dim]{escape(self.name)} {place}: {escape(label)}[/]", highlight=False, soft_wrap=True)

    def outcome(self, outcome: Outcome) -> None:
        self.progress.remove_task(self.task)
        colour = "green" if outcome.status == "passed" else "red"
        note = "" if outcome.result else f": {escape((outcome.error or '').strip().splitlines()[-1])}"
        line = f"[{colour}]{outcome.status}[/] [bold]{escape(outcome.pipeline)}[/] in {report.duration(outcome.seconds)}{note}"
        self.progress.console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def _live(console: Console, pipeline_count: int) -> Iterator[_Watcher]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[trial]}[/]"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Watcher(progress, pipeline_count)


def _show(console: Console, outcome: Outcome) -> None:
    """Print a finished pipeline's boards."""
    for board in outcome.result.boards if outcome.result else ():
        console.print("", _board_table(f"{outcome.pipeline}: {board.title}", board))


def _board_table(title: str, board: Board) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim")
    if len(board.tasks) > 1:
        table.add_column(escape(report.metric_title(board)), overflow="fold")
        for model in board.models:
            table.add_column(escape(model), justify="right")
        for task in board.tasks:
            best, cells = board.best(task), []
            for model in board.models:
                each = board.find(task, model)
                shown = "" if each is None else board.metric.show(each.mean)
                cells.append(f"[bold green]{shown}[/]" if each is not None and each is best else shown)
            table.add_row(escape(task), *cells)
        return table
    table.add_column("model", overflow="fold")
    for heading in (report.metric_title(board), "parameters", "ms / step", "peak MiB"):
        table.add_column(escape(heading), justify="right")
    best = board.best(board.tasks[0]) if board.tasks else None
    for each in board.measurements:
        score = board.metric.show_spread(each.mean, each.deviation)
        name = f"[dim]{escape(each.model)} (baseline)[/]" if each.baseline else escape(each.model)
        costs = f"{each.parameters:,}", report.milliseconds(each.step_ms), report.mebibytes(each.peak_mib)
        table.add_row(name, f"[bold green]{score}[/]" if each is best else score, *costs)
    return table


def _summary(console: Console, run: Run, out: Path, chosen: Sequence[str]) -> None:
    console.print()
    passed, left = len(run.outcomes) - len(run.failed), len(chosen) - len(run.outcomes)
    text = f"{passed} of {len(chosen)} pipelines passed in {report.duration(run.seconds)}" + (f", {left} not started" if left else "")
    console.print(
        f"[{'red' if passed < len(chosen) else 'green'}]{text}[/]; kernels: {report.kernel_summary(run.kernels)}", highlight=False
    )
    console.print(f"wrote {escape(str(out / 'report.html'))} and {escape(str(out / 'results.json'))}", highlight=False, soft_wrap=True)
