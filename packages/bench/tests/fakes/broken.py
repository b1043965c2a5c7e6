"""A pipeline that raises in a trial."""

from phyla.bench import Context, PipelineResult
from phyla.bench.sandbox import Progress


def fail(progress: Progress) -> float:
    raise ArithmeticError("the sum does not add up")


def run(context: Context) -> PipelineResult:
    context.trial("fail", fail)
    raise AssertionError("not reached")
