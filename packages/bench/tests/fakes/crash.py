"""A pipeline whose trial kills its own process, as a bad kernel would."""

import os
import signal

from phyla.bench import Context, PipelineResult
from phyla.bench.sandbox import Progress


def die(progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def run(context: Context) -> PipelineResult:
    context.trial("die", die)
    raise AssertionError("not reached")
