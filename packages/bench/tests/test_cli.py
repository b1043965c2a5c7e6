import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phyla.bench import read_run


def one_line(result, *words):
    """The call failed with one line on the error stream that holds all words, and printed nothing else."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("phyla: ")
    for word in words:
        assert word in result.stderr
    return True


def test_run_writes_both_files_and_prints_a_table(phyla, tmp_path):
    result = phyla("run", "good", "--out", tmp_path, "--seed", 3, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(tmp_path)) == ["report.html", "results.json"]
    for word in (
        "good 1/2: new <model>",
        "passed good",
        "new <model>",
        "old & plain (baseline)",
        "test accuracy (%)",
        "1 of 1 pipelines passed",
    ):
        assert word in result.stdout
    run = read_run(tmp_path / "results.json")
    assert (run.mode, run.seed, run.threads) == ("quick", 3, 1)
    assert [outcome.status for outcome in run.outcomes] == ["passed"]
    assert run.outcomes[0].result.seeds == (3, 4)
    assert "torch" in run.versions
    assert "phyla-bench" in run.versions
    first = run.outcomes[0].result.boards[0].measurements[0]
    assert len(set(first.scores)) == 2
    assert first.peak_mib is None or 15 < first.peak_mib < 80


def test_full_runs_more_seeds(phyla, tmp_path):
    assert phyla("run", "good", "--full", "--out", tmp_path).exit_code == 0
    run = read_run(tmp_path / "results.json")
    assert run.mode == "full"
    assert run.outcomes[0].result.seeds == (0, 1, 2)


def test_same_seed_same_scores(phyla, tmp_path):
    def scores(folder, threads):
        phyla("run", "good", "--out", folder, "--seed", 7, "--threads", threads)
        return [each.scores for each in read_run(folder / "results.json").outcomes[0].result.boards[0].measurements]

    assert scores(tmp_path / "a", 1) == scores(tmp_path / "b", 2)


def test_a_failing_pipeline_is_reported_and_does_not_stop_the_others(phyla, tmp_path):
    result = phyla("run", "broken", "crash", "good", "--out", tmp_path)
    assert result.exit_code == 1
    broken, crash, good = read_run(tmp_path / "results.json").outcomes
    assert [each.status for each in (broken, crash, good)] == ["failed", "failed", "passed"]
    assert "ArithmeticError: the sum does not add up" in broken.error
    assert "SIGSEGV" in crash.error
    assert "failed broken" in result.stdout
    assert "the sum does not add up" in result.stdout
    assert "1 of 3 pipelines passed" in result.stdout
    assert "the sum does not add up" in (tmp_path / "report.html").read_text()


def test_ctrl_c_keeps_what_was_finished(phyla, tmp_path):
    result = phyla("run", "good", "stopped", "broken", "--out", tmp_path)
    assert result.exit_code == 130
    run = read_run(tmp_path / "results.json")
    assert [(each.pipeline, each.status) for each in run.outcomes] == [("good", "passed"), ("stopped", "interrupted")]
    assert "1 not started" in result.stdout
    assert "A good pipeline" in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(os.name != "posix", reason="signals to a process group are POSIX")
def test_a_real_interrupt_in_the_middle_of_a_trial(tmp_path):
    code = "import sys; from phyla.bench import cli, pipelines; pipelines.__path__[:] = [sys.argv[1]]; cli.app(sys.argv[2:])"
    arguments = [
        sys.executable,
        "-c",
        code,
        str(Path(__file__).with_name("fakes")),
        "run",
        "good",
        "slow",
        "broken",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("passed good"):
            time.sleep(1.0)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the command, its server and the trial all get it
    assert process.wait(timeout=60) == 130, "".join(seen)
    assert [each.status for each in read_run(tmp_path / "results.json").outcomes] == ["passed", "interrupted"]
    assert "Traceback" not in "".join(seen)


def test_unknown_pipeline_names_the_nearest(phyla, tmp_path):
    assert one_line(phyla("run", "goood", "--out", tmp_path / "new"), "'goood'", "did you mean 'good'?")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "", "99999999999"])
@pytest.mark.parametrize("option", ["--threads", "--seed"])
def test_bad_numbers(phyla, tmp_path, option, value):
    if (option, value) == ("--seed", "0"):
        return
    assert one_line(phyla("run", "good", f"{option}={value}", "--out", tmp_path / "new"), option, repr(value))
    assert not (tmp_path / "new").exists()


def test_unwritable_folder_stops_before_anything_runs(phyla, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert one_line(phyla("run", "broken", "--out", tmp_path / "file"), "cannot write", "file")
    assert one_line(phyla("run", "broken", "--out", tmp_path / "file" / "below"), "cannot write")
    assert one_line(phyla("run", "broken", "--out", "/proc/phyla"), "cannot write", "/proc/phyla")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_report_renders_again(phyla, tmp_path):
    phyla("run", "good", "--out", tmp_path)
    first = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    assert phyla("report", tmp_path / "results.json").exit_code == 0
    assert (tmp_path / "report.html").read_text() == first
    assert phyla("report", tmp_path / "results.json", "--out", tmp_path / "deep" / "other.html").exit_code == 0
    assert (tmp_path / "deep" / "other.html").read_text() == first


@pytest.mark.parametrize("command", ["report", "compare"])
def test_broken_results_files(phyla, tmp_path, command):
    phyla("run", "good", "--out", tmp_path)
    good = json.loads((tmp_path / "results.json").read_text())
    cases = {
        "missing.json": (None, ["No such file"]),
        "empty.json": ("", ["not a results file"]),
        "cut.json": (json.dumps(good)[:500], ["not a results file"]),
        "list.json": ("[1, 2]", ["schema"]),
        "deep.json": ("[" * 100_000, ["not a results file"]),
        "future.json": (json.dumps(good | {"schema": 99}), ["schema 1", "99"]),
        "kind.json": (json.dumps(good | {"threads": "two"}), ["threads", "int", "'two'"]),
        "lack.json": (json.dumps({k: v for k, v in good.items() if k != "outcomes"}), ["outcomes", "missing"]),
        "status.json": (json.dumps(good | {"outcomes": [{**good["outcomes"][0], "status": "fine"}]}), ["outcomes[0].status", "'fine'"]),
        "date.json": (json.dumps(good | {"started": "yesterday"}), ["started", "'yesterday'"]),
    }
    for name, (text, words) in cases.items():
        path = tmp_path / "broken" / name
        path.parent.mkdir(exist_ok=True)
        if text is not None:
            path.write_text(text)
        assert one_line(phyla(command, path, *([path] if command == "compare" else [])), name, *words)
    assert "report.html" not in os.listdir(tmp_path / "broken")


def test_compare_shows_what_changed(phyla, tmp_path):
    phyla("run", "good", "--out", tmp_path / "a")
    data = json.loads((tmp_path / "a" / "results.json").read_text())
    first, second = data["outcomes"][0]["result"]["boards"][0]["measurements"]
    first["scores"], second["model"] = [91.0, 92.0], "renamed"
    data["versions"]["torch"] = "9.9"
    (tmp_path / "b.json").write_text(json.dumps(data))
    result = phyla("compare", tmp_path / "a" / "results.json", tmp_path / "b.json")
    assert result.exit_code == 0
    for word in ("torch", "9.9", "91.5 ± 0.7", "better", "1 new", "1 gone", "6 same"):
        assert word in result.stdout
    same = phyla("compare", tmp_path / "b.json", tmp_path / "b.json")
    assert "8 same" in same.stdout
    assert "Different settings" not in same.stdout


def test_list_names_every_system(phyla):
    result = phyla("list")
    assert result.exit_code == 0
    for word in ("phyla-kan-family", "KANLinear", "VisionTransformer", "Kolmogorov-Arnold Networks", "good"):
        assert word in result.stdout


def test_help(phyla):
    result = phyla("--help")
    assert result.exit_code == 0
    for command in ("list", "run", "report", "compare"):
        assert command in result.stdout
