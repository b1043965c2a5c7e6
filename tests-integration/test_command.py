"""The command `phyla`, from its arguments to its report, over the packages that it measures."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phyla.bench import cli, pipelines, read_run


def test_list_names_the_systems_and_the_pipelines() -> None:
    command = Path(sys.executable).with_name("phyla")
    printed = subprocess.run([command, "list"], check=True, capture_output=True, text=True).stdout
    assert "phyla-kan-family" in printed
    assert all(name in printed for name in pipelines.names())


def test_a_tiny_run_trains_reports_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "__path__", [str(Path(__file__).with_name("pipelines"))])
    phyla = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    result = phyla.invoke(cli.app, ["run", "tiny", "--threads", "1", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").stat().st_size > 1000
    results = tmp_path / "results.json"
    (outcome,) = read_run(results).outcomes
    assert outcome.result is not None
    kan, mlp = outcome.result.boards[0].measurements
    assert 0 < kan.scores[0] < 0.2  # the sine's own size is 0.7
    assert mlp.baseline
    compared = phyla.invoke(cli.app, ["compare", str(results), str(results)])
    assert compared.exit_code == 0, compared.output
    assert "2 same" in compared.stdout
