"""The integration benchmarks of the phyla packages: command `phyla`.

A pipeline is one file in `pipelines/`; what it may use is what is named here and in `measure`.
"""

from phyla.bench.results import Board, Chart, Line, Measurement, Metric, PipelineResult, Run, Table, read_run
from phyla.bench.runner import Context

__all__ = ["Board", "Chart", "Context", "Line", "Measurement", "Metric", "PipelineResult", "Run", "Table", "read_run"]
