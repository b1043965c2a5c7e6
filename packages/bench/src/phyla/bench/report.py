"""One self-contained HTML page of a run: tables, plots as inline SVG, the environment. It needs no network and prints on A4."""

import html
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib.resources import files

from phyla.bench.plots import board_svg, chart_svg
from phyla.bench.results import Board, Measurement, Outcome, Run, Table

_READING = (
    "Scores are mean ± sample standard deviation over the seeds. The time of a step is the median over all training steps (forward, "
    "backward, optimizer). Peak memory is the largest resident memory of a fresh process above its level before the model was built; "
    "it holds model, gradients, optimizer state, activations and the libraries' work space. Rows on grey are baselines."
)


def render(run: Run) -> str:
    """Return the page of `run` as HTML text."""
    seeds = sorted({seed for outcome in run.outcomes if outcome.result for seed in outcome.result.seeds})
    facts = {
        "mode": run.mode,
        "date": datetime.fromisoformat(run.started).strftime("%Y-%m-%d %H:%M"),
        "duration": duration(run.seconds),
        "seeds": ", ".join(map(str, seeds)) or str(run.seed),
        "threads": str(run.threads),
        "kernels": kernel_summary(run.kernels),
    }
    parts = [
        "<h1>phyla benchmarks</h1>",
        '<ul class="facts">' + "".join(f"<li>{_text(key)} <b>{_text(value)}</b></li>" for key, value in facts.items()) + "</ul>",
        _overview(run),
        *(_pipeline(index, outcome) for index, outcome in enumerate(run.outcomes)),
        "<h2>Environment</h2>",
        _pairs("Kernels", "package", "compute kernels", run.kernels),
        _pairs("Machine", "", "", run.environment),
        _pairs("Versions", "distribution", "version", run.versions),
        "<h3>How to read the numbers</h3>",
        f"<p>{_READING}</p>",
    ]
    return _page("phyla benchmarks", "\n".join(parts))


def duration(seconds: float) -> str:
    """Return a duration as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def kernel_summary(kernels: Mapping[str, str]) -> str:
    """Say in a word whether the kernels are native."""
    native = [name for name, text in kernels.items() if text.startswith("native")]
    if not kernels:
        return "none loaded"
    return "native" if len(native) == len(kernels) else f"native in {len(native)} of {len(kernels)} packages"


def metric_title(board: Board) -> str:
    """Return a board's metric with its unit, as a column title."""
    return board.metric.name + (f" ({board.metric.unit})" if board.metric.unit else "")


def _page(title: str, body: str) -> str:
    style = files("phyla.bench").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _table(
    header: Iterable[tuple[str, str]], rows: Iterable[tuple[str, Iterable[tuple[str, str]]]], caption: str = "", style: str = ""
) -> str:
    """Return a table; cells are (class, text), rows are (class, cells)."""
    head = "".join(f'<th class="{kind}">{_text(text)}</th>' for kind, text in header)
    body = "".join(
        f'<tr class="{row}">' + "".join(f'<td class="{kind}">{_text(text)}</td>' for kind, text in cells) + "</tr>\n" for row, cells in rows
    )
    note = f"<caption>{_text(caption)}</caption>" if caption else ""
    thead = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{style}">{note}{thead}<tbody>\n{body}</tbody></table></div>'


def _overview(run: Run) -> str:
    rows = []
    for outcome in run.outcomes:
        title = outcome.result.title if outcome.result else (outcome.error or "").strip().splitlines()[-1]
        rows.append(("", (("", outcome.pipeline), (outcome.status, outcome.status), ("", title), ("n", duration(outcome.seconds)))))
    return _table((("", "pipeline"), ("", "status"), ("", ""), ("n", "time")), rows)


def _pipeline(index: int, outcome: Outcome) -> str:
    name = f'<h2 id="{_text(outcome.pipeline)}">{_text(outcome.result.title if outcome.result else outcome.pipeline)}</h2>'
    if outcome.result is None:
        ending = f"{outcome.status} after {duration(outcome.seconds)}"
        return f'{name}\n<p class="{outcome.status}">{ending}</p>\n<pre>{_text(outcome.error or "")}</pre>'
    parts = [name, *(f"<p>{_text(paragraph)}</p>" for paragraph in outcome.result.about.strip().split("\n\n"))]
    for number, board in enumerate(outcome.result.boards):
        parts += [f"<h3>{_text(board.title)}</h3>", _board(board), _figure(board_svg(board, prefix=f"p{index}b{number}"))]
    for number, chart in enumerate(outcome.result.charts):
        parts += [f"<h3>{_text(chart.title)}</h3>", _figure(chart_svg(chart, prefix=f"p{index}c{number}"))]
    parts += [f"<h3>{_text(table.title)}</h3>\n{_free_table(table)}" for table in outcome.result.tables]
    return "\n".join(parts)


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _board(board: Board) -> str:
    return _one_task(board) if len(board.tasks) == 1 else _many_tasks(board) + _costs(board)


def _one_task(board: Board) -> str:
    header = [("", "model"), ("n", metric_title(board)), ("n", "parameters"), ("n", "ms / step"), ("n", "peak MiB"), ("", "training")]
    best = board.best(board.tasks[0])
    rows = []
    for each in board.measurements:
        score = board.metric.show_spread(each.mean, each.deviation)
        cells = (("", each.model), ("n best" if each is best else "n", score), *_cost_cells(each), ("", each.recipe))
        rows.append(("baseline" if each.baseline else "", cells))
    return _table(header, rows)


def _cost_cells(each: Measurement) -> tuple[tuple[str, str], ...]:
    return (("n", f"{each.parameters:,}"), ("n", milliseconds(each.step_ms)), ("n", mebibytes(each.peak_mib)))


def milliseconds(value: float) -> str:
    """Return a step's time with two or three digits."""
    return "–" if not math.isfinite(value) else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def mebibytes(value: float | None) -> str:
    """Return memory as text, a dash where unknown."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _many_tasks(board: Board) -> str:
    header = [("", "task"), *(("n", model) for model in board.models)]
    rows = []
    for task in board.tasks:
        best = board.best(task)
        cells = [("", task)]
        for model in board.models:
            each = board.find(task, model)
            shown = "–" if each is None else board.metric.show_spread(each.mean, each.deviation)
            cells.append(("n best" if each is not None and each is best else "n", shown))
        rows.append(("", cells))
    return _table(header, rows, f"{metric_title(board)}, {board.metric.better} is better; the best of each row is marked.", "dense")


def _costs(board: Board) -> str:
    """Return what each model costs, as the range over tasks."""
    header = [("", "model"), ("n", "parameters"), ("n", "ms / step"), ("n", "peak MiB"), ("", "training")]
    rows = []
    for model in board.models:
        mine = [each for each in board.measurements if each.model == model]
        counts = [each.parameters for each in mine]
        peaks = [each.peak_mib for each in mine if each.peak_mib is not None]
        slow = max((each.step_ms for each in mine if math.isfinite(each.step_ms)), default=math.nan)
        size = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
        cells = (("", model), ("n", size), ("n", milliseconds(slow)), ("n", mebibytes(max(peaks, default=None))), ("", mine[0].recipe))
        rows.append(("baseline" if mine[0].baseline else "", cells))
    return _table(header, rows, "Parameters: smallest and largest task. Time and memory: the most over the tasks.")


def _free_table(table: Table) -> str:
    return _table((("", title) for title in table.header), (("", (("", cell) for cell in row)) for row in table.rows))


def _pairs(title: str, left: str, right: str, pairs: Mapping[str, str]) -> str:
    header = (("", left), ("", right)) if left else ()
    rows = (("", (("", key), ("", value))) for key, value in pairs.items())
    return f"<h3>{_text(title)}</h3>\n" + (_table(header, rows) if pairs else '<p class="soft">none</p>')
