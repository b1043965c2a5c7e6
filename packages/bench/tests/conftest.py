from pathlib import Path

import pytest
from typer.testing import CliRunner

from phyla.bench import cli, pipelines


@pytest.fixture
def fakes(monkeypatch):
    """Replace the folder of pipelines by the small ones of the tests."""
    monkeypatch.setattr(pipelines, "__path__", [str(Path(__file__).with_name("fakes"))])


@pytest.fixture
def phyla(fakes):
    """Call the command with arguments; the result has exit_code, stdout and stderr."""
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    return lambda *arguments: runner.invoke(cli.app, [str(each) for each in arguments])
