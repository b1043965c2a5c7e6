"""What a run leaves behind: frozen, plain values that are written to `results.json` and read back unchanged.

A pipeline returns one `PipelineResult`; the report, the terminal's table and `phyla compare` know these types
and nothing about the pipelines.
"""

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

SCHEMA = 1
"""The version of the file format. A file with another number is refused, not guessed at."""


class ResultsError(ValueError):
    """A results file that cannot be read; the message names the file, the place in it, what was expected and what came."""


@dataclass(frozen=True)
class Metric:
    """What a board's scores measure, and which way is up.

    Args:
        name: as the field says it, for example `"test accuracy"`.
        unit: `"%"`, `"s"`, or empty for a pure number.
        better: whether a `"higher"` or a `"lower"` score is the better one.
        scale: `"linear"` scores are shown with one decimal, `"log"` scores in scientific notation and on a logarithmic axis.
    """

    name: str
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"
    scale: Literal["linear", "log"] = "linear"

    def show(self, value: float) -> str:
        """Return one score as text, without its unit."""
        if not math.isfinite(value):
            return "diverged"
        return f"{value:.1e}" if self.scale == "log" else f"{value:.1f}"

    def show_spread(self, mean: float, deviation: float) -> str:
        """Return `mean ± deviation`; a deviation that is unknown (one seed) or not finite is left out."""
        if not math.isfinite(mean) or not math.isfinite(deviation):
            return self.show(mean)
        if self.scale == "linear":
            return f"{mean:.1f} ± {deviation:.1f}"
        exponent = math.floor(math.log10(abs(mean))) if mean else 0
        return f"({mean / 10**exponent:.1f} ± {deviation / 10**exponent:.1f})e{exponent:+03d}"


@dataclass(frozen=True)
class Measurement:
    """One model on one task, over all seeds.

    Args:
        model: the model's name.
        scores: one score a seed; not-a-number where training diverged.
        parameters: trainable numbers in the model.
        step_ms: median time of one training step in milliseconds.
        peak_mib: peak resident memory of a fresh process above its level before the model was built, in MiB; None where unknown.
        task: the task's name, empty when the board has only one.
        baseline: whether the model is a baseline that the others are held against.
        recipe: how it was trained, in words.
    """

    model: str
    scores: tuple[float, ...]
    parameters: int
    step_ms: float
    peak_mib: float | None = None
    task: str = ""
    baseline: bool = False
    recipe: str = ""

    @property
    def mean(self) -> float:
        """The mean score; not-a-number if any seed diverged."""
        return sum(self.scores) / len(self.scores) if self.scores else math.nan

    @property
    def deviation(self) -> float:
        """The sample standard deviation of the scores; not-a-number with fewer than two seeds."""
        if len(self.scores) < 2:
            return math.nan
        mean = self.mean
        return math.sqrt(sum((score - mean) ** 2 for score in self.scores) / (len(self.scores) - 1))


@dataclass(frozen=True)
class Board:
    """Measurements of several models on one or several tasks, all by one metric."""

    title: str
    metric: Metric
    measurements: tuple[Measurement, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of their first measurement."""
        return tuple(dict.fromkeys(each.task for each in self.measurements))

    @property
    def models(self) -> tuple[str, ...]:
        """The models, in the order of their first measurement."""
        return tuple(dict.fromkeys(each.model for each in self.measurements))

    def find(self, task: str, model: str) -> Measurement | None:
        """Return the measurement of `model` on `task`, or None."""
        return next((each for each in self.measurements if (each.task, each.model) == (task, model)), None)

    def best(self, task: str) -> Measurement | None:
        """Return the best finite measurement on `task`, or None if all diverged."""
        finite = [each for each in self.measurements if each.task == task and math.isfinite(each.mean)]
        pick = max if self.metric.better == "higher" else min
        return pick(finite, key=lambda each: each.mean) if finite else None

    def require_equal_budget(self, tolerance: float = 0.05) -> None:
        """Raise unless, on every task, all models have the same number of parameters up to `tolerance`.

        Raises:
            ValueError: naming the task, the model and both counts.
        """
        for task in self.tasks:
            here = [each for each in self.measurements if each.task == task]
            budget = sorted(each.parameters for each in here)[len(here) // 2]
            for each in here:
                if abs(each.parameters - budget) > tolerance * budget:
                    raise ValueError(
                        f"{each.model}: expected {budget} parameters up to {tolerance:.0%} on {task or self.title!r}, got {each.parameters}"
                    )


@dataclass(frozen=True)
class Line:
    """One curve of a chart; `baseline` curves are drawn dashed."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    baseline: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_y: bool = False


@dataclass(frozen=True)
class Table:
    """Anything that is best said in words and numbers; every row has as many cells as `header`."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class PipelineResult:
    """What one pipeline found.

    Args:
        title: a headline.
        about: what was measured on which data, against what, as plain text.
        seeds: the seeds of the repetitions.
        boards: the measurements.
        charts: curves to draw; every board is drawn without being listed here.
        tables: further findings.
    """

    title: str
    about: str
    seeds: tuple[int, ...]
    boards: tuple[Board, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How one pipeline ended: with a result, or with an error (its traceback as text)."""

    pipeline: str
    status: Literal["passed", "failed", "interrupted"]
    seconds: float
    result: PipelineResult | None = None
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """One call of `phyla run`, as `results.json` keeps it.

    Args:
        started: date and time with offset, ISO 8601.
        seconds: wall-clock time of the whole run.
        mode: `"quick"` or `"full"`.
        seed: the first seed.
        threads: threads of torch in every trial.
        environment: the machine, the operating system, Python.
        versions: distribution name to version.
        kernels: package name to "native" or "composite" and why.
        outcomes: one for each pipeline that was started.
        schema: the version of this format.
    """

    started: str
    seconds: float
    mode: Literal["quick", "full"]
    seed: int
    threads: int
    environment: Mapping[str, str]
    versions: Mapping[str, str]
    kernels: Mapping[str, str]
    outcomes: tuple[Outcome, ...]
    schema: int = field(default=SCHEMA)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The outcomes that are not "passed"."""
        return tuple(outcome for outcome in self.outcomes if outcome.status != "passed")


def to_json(run: Run) -> str:
    """Return `run` as JSON text. Numbers that are not finite become null (JSON has no word for them)."""
    return json.dumps(_finite(asdict(run)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_run(path: Path) -> Run:
    """Read a results file.

    Raises:
        ResultsError: if the file is missing, is not JSON, has another schema or a field of a wrong kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{path}: not a results file: not UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ResultsError(f"{path}: not a results file: {error}") from None
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise ResultsError(f"{path}: expected a results file of schema {SCHEMA}, got schema {schema!r}")
    try:
        run = _decode(Run, value, "")
        datetime.fromisoformat(run.started)
        return run
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from None
    except ValueError:
        raise ResultsError(f"{path}: started: expected a date and time in ISO 8601, got {value['started']!r}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_T = TypeVar("_T")


def _decode(kind: type[_T], value: Any, where: str) -> _T:
    """Rebuild a value of the annotated type `kind` from parsed JSON; the inverse of `_finite(asdict(...))`."""
    return typing.cast(_T, _rebuild(kind, value, where))


def _rebuild(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) is int:
        return float(value)
    if kind in (str, int, float, bool):
        if type(value) is kind:
            return value
    elif origin is Literal and value in arguments:
        return value
    elif origin is types.UnionType:  # only X | None occurs
        return None if value is None else _rebuild(arguments[0], value, where)
    elif origin is tuple and isinstance(value, list):
        return tuple(_rebuild(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(value))
    elif origin is Mapping and isinstance(value, dict):
        return {key: _rebuild(str, each, f"{where}.{key}") for key, each in value.items()}
    elif isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        names = [each.name for each in fields(kind)]
        for name in names:
            if name not in value:
                raise ResultsError(f"{f'{where}.{name}'.lstrip('.')}: missing")
        return kind(**{name: _rebuild(hints[name], value[name], f"{where}.{name}".lstrip(".")) for name in names})
    name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    shown = repr(value)
    raise ResultsError(f"{where or 'file'}: expected {name}, got {shown if len(shown) <= 60 else shown[:57] + '...'}")
