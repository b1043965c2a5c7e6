"""What changed between two runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from phyla.bench.results import Board, Measurement, Run

Verdict = Literal["better", "worse", "same", "new", "gone"]
NOISE = 2.0
"""A difference of means counts from this many standard errors on; with one seed there is no error to compare with, so only 5 % counts."""
TIME_NOISE = 1.25
"""Times and memory differ between runs of the same code by up to about this factor."""


@dataclass(frozen=True)
class Change:
    """One measurement in both runs (as text, empty where it is missing), and what became of it."""

    pipeline: str
    task: str
    model: str
    before: str
    after: str
    verdict: Verdict
    step_ratio: float
    memory_ratio: float


def changes(old: Run, new: Run) -> tuple[Change, ...]:
    """Return every measurement that is in either run, in the order of the new one, then what is gone."""
    before, after = _measurements(old), _measurements(new)
    found = []
    for key in dict.fromkeys([*after, *before]):
        board, mine = after.get(key, (None, None))
        old_board, theirs = before.get(key, (None, None))
        shown_before = old_board.metric.show_spread(theirs.mean, theirs.deviation) if old_board and theirs else ""
        shown_after = board.metric.show_spread(mine.mean, mine.deviation) if board and mine else ""
        if board is None or mine is None:
            verdict: Verdict = "gone"
        elif theirs is None:
            verdict = "new"
        else:
            verdict = _verdict(board, theirs, mine)
        ratio = _ratio(mine, theirs, "step_ms"), _ratio(mine, theirs, "peak_mib")
        found.append(Change(key[0], key[2], key[3], shown_before, shown_after, verdict, *ratio))
    return tuple(found)


def setting_changes(old: Run, new: Run) -> tuple[tuple[str, str, str], ...]:
    """Return (what, before, after) for everything about the two runs' settings, versions, machine and outcomes that differs."""
    return tuple((key, a, b) for key, a, b in _pairs(_settings(old), _settings(new)) if a != b)


def _settings(run: Run) -> dict[str, str]:
    facts = {"mode": run.mode, "seed": str(run.seed), "threads": str(run.threads), **run.versions, **run.environment, **run.kernels}
    return facts | {f"pipeline {outcome.pipeline}": outcome.status for outcome in run.outcomes}


def _pairs(old: Mapping[str, str], new: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [(key, old.get(key, ""), new.get(key, "")) for key in dict.fromkeys([*old, *new])]


def _measurements(run: Run) -> dict[tuple[str, str, str, str], tuple[Board, Measurement]]:
    return {
        (outcome.pipeline, board.title, each.task, each.model): (board, each)
        for outcome in run.outcomes
        if outcome.result is not None
        for board in outcome.result.boards
        for each in board.measurements
    }


def _verdict(board: Board, before: Measurement, after: Measurement) -> Verdict:
    """Judge the change of the mean by Welch's standard error of a difference."""
    if not math.isfinite(before.mean) or not math.isfinite(after.mean):
        both = math.isfinite(before.mean) == math.isfinite(after.mean)
        return "same" if both else "better" if math.isfinite(after.mean) else "worse"
    gain = after.mean - before.mean if board.metric.better == "higher" else before.mean - after.mean
    error = math.sqrt(sum(each.deviation**2 / len(each.scores) for each in (before, after)))
    threshold = NOISE * error if math.isfinite(error) else 0.05 * abs(before.mean)
    if abs(gain) <= threshold:
        return "same"
    return "better" if gain > 0 else "worse"


def _ratio(after: Measurement | None, before: Measurement | None, cost: Literal["step_ms", "peak_mib"]) -> float:
    new, old = getattr(after, cost, None), getattr(before, cost, None)
    return new / old if new is not None and old else math.nan
