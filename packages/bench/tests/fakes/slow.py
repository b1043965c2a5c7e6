"""A pipeline whose trial outlasts everyone's patience."""

import time

from phyla.bench import Context, PipelineResult
from phyla.bench.sandbox import Progress


def wait(progress: Progress) -> None:
    time.sleep(600)


def run(context: Context) -> PipelineResult:
    context.trial("wait", wait)
    raise AssertionError("not reached")
