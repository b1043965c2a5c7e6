"""A pipeline during which the user presses Ctrl-C."""

from phyla.bench import Context, PipelineResult


def run(context: Context) -> PipelineResult:
    raise KeyboardInterrupt
