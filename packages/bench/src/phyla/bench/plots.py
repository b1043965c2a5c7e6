"""Boards and charts as inline SVG that needs nothing from outside the page."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from phyla.bench.results import Board, Chart

COLOURS = ("#0b6e8a", "#c4511a", "#4b7f2a", "#7a4ea3", "#b8890f", "#a8325e", "#35618f", "#6b6b2f", "#14806b", "#8c4a2f")
BASELINE_COLOURS = ("#3a3a3a", "#7d7d7d", "#a6a6a6")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.8,
    "xtick.color": "#30343b",
    "ytick.color": "#30343b",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
    "svg.hashsalt": "phyla",
    "path.simplify": True,
}
WIDTH = 7.2  # inches; the page's text width on A4 is 7.1


def board_svg(board: Board, *, prefix: str) -> str:
    """Draw every measurement as a dot with its spread, one row a model (or one row a task and one colour a model)."""
    tasks, models = board.tasks, board.models
    rows = tasks if len(tasks) > 1 else models
    figure, axes = _figure(0.7 + (0.42 if len(tasks) > 1 else 0.3) * len(rows))
    colours = _colours([(model, any(each.model == model and each.baseline for each in board.measurements)) for model in models])
    diverged = []
    for measurement in board.measurements:
        model = models.index(measurement.model)
        place = tasks.index(measurement.task) + 0.6 * ((model + 0.5) / len(models) - 0.5) if len(tasks) > 1 else model
        if not math.isfinite(measurement.mean):
            diverged.append((place, colours[measurement.model]))
            continue
        spread = measurement.deviation if math.isfinite(measurement.deviation) else 0.0
        low = min(spread, 0.9 * measurement.mean) if board.metric.scale == "log" else spread
        label = measurement.model if measurement.task == tasks[0] else None
        marker = "s" if measurement.baseline else "o"
        style = {"color": colours[measurement.model], "markersize": 5.5 if len(tasks) == 1 else 4.5, "elinewidth": 1.4, "capsize": 2.5}
        axes.errorbar(measurement.mean, place, xerr=[[low], [spread]], fmt=marker, label=label, **style)
    for place, colour in diverged:
        axes.annotate("diverged", (0.01, place), xycoords=("axes fraction", "data"), color=colour, va="center", fontsize=9)
    if board.metric.scale == "log":
        axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=len(tasks) == 1)
    unit = f" ({board.metric.unit})" if board.metric.unit else ""
    axes.set_xlabel(f"{board.metric.name}{unit}, {board.metric.better} is better; bars: ± one standard deviation over seeds")
    if len(tasks) > 1:
        for edge in range(1, len(rows)):
            axes.axhline(edge - 0.5, color="#e3e6ea", linewidth=0.8)
        _legend(axes, len(models))
    return _svg(figure, prefix, f"{board.title}: {board.metric.name} of {', '.join(models)}")


def chart_svg(chart: Chart, *, prefix: str) -> str:
    """Draw the lines of a chart."""
    figure, axes = _figure(3.0)
    colours = _colours([(line.label, line.baseline) for line in chart.lines])
    for line in chart.lines:
        dashes = (0, (4, 2)) if line.baseline else "solid"
        axes.plot(line.x, line.y, label=line.label, color=colours[line.label], linewidth=1.6, linestyle=dashes)
    if chart.log_y:
        axes.set_yscale("log")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.margins(x=0.01)
    if len(chart.lines) > 1:
        _legend(axes, len(chart.lines))
    return _svg(figure, prefix, f"{chart.title}: {chart.y_label} over {chart.x_label}")


def _colours(entries: Sequence[tuple[str, bool]]) -> dict[str, str]:
    """Give baselines greys and everything else a colour of its own."""
    chosen: dict[str, str] = {}
    for wanted, palette in ((False, COLOURS), (True, BASELINE_COLOURS)):
        labels = dict.fromkeys(label for label, baseline in entries if baseline is wanted)
        chosen |= {label: palette[index % len(palette)] for index, label in enumerate(labels)}
    return chosen


def _figure(height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.add_subplot()


def _legend(axes: Any, entries: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=min(entries, 5),
        borderaxespad=0.2,
        handlelength=1.6,
        columnspacing=1.4,
        frameon=False,
        fontsize=9,
    )


def _svg(figure: Any, prefix: str, description: str) -> str:
    """Return the figure as an `<svg>` element whose ids start with `prefix`, so that several fit into one page."""
    import html

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1).strip()
