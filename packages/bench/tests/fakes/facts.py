"""A pipeline that reports what its trials see: threads, process, progress."""

import os

import torch

from phyla.bench import Context, PipelineResult, Table
from phyla.bench.sandbox import Progress


def facts(progress: Progress, *, floats: int) -> tuple[int, int]:
    for share in (0.25, 0.5, 0.75):
        progress(share)
    torch.ones(floats)
    return torch.get_num_threads(), os.getpid()


def run(context: Context) -> PipelineResult:
    threads, process = context.trial("facts", facts, floats=1).value
    return PipelineResult("Facts", "", (0,), tables=(Table("t", ("threads", "fresh"), ((str(threads), str(process != os.getpid())),)),))
