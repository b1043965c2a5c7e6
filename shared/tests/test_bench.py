import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from phyla.shared.bench import Case, Step, compare, measure, peak_memory, show

SCRIPT = """
import torch
from phyla.shared.bench import Case, Step, main

def ours() -> Step:
    x = torch.randn(64, 64)
    return lambda: x @ x

def doubled() -> Step:
    x = torch.randn(64, 64)
    return lambda: (x @ x) @ x

CASES = [Case("square", {"ours": ours, "doubled": doubled}, flops=2 * 64**3, bytes=8 * 64**2, target=1000.0), Case("other", {"ours": ours})]

if __name__ == "__main__":
    main(CASES)
"""


def sleeper(seconds: float) -> Step:
    return partial(time.sleep, seconds)


def test_ratio_is_that_of_the_times() -> None:
    case = Case("sleep", {"ours": partial(sleeper, 0.004), "peer": partial(sleeper, 0.012)}, target=2.0)
    result = measure(case, repeats=5, min_time=0.001, memory=False)
    ours, peer = result.timings
    assert (ours.name, peer.name, result.rounds) == ("ours", "peer", 5)
    assert (ours.ratio, ours.ratio_spread, ours.floor, ours.memory) == (1.0, 0.0, None, None)
    assert ours.seconds >= 0.004
    assert peer.seconds >= 0.012
    assert 1.5 < peer.ratio < 3.5
    assert result.met


def test_slow_steps_get_fewer_rounds_but_three_at_least() -> None:
    case = Case("sleep", {"ours": partial(sleeper, 0.02)})
    assert measure(case, repeats=1000, max_time=0.2, memory=False).rounds <= 10
    assert measure(case, repeats=1000, max_time=0.0, memory=False).rounds == 3
    assert measure(case, repeats=2, max_time=0.0, memory=False).rounds == 2


def test_a_plain_copy_is_at_its_own_floor() -> None:
    count = 4_000_000

    def copy() -> Step:
        source, target = torch.ones(count), torch.ones(count)
        return lambda: target.copy_(source)

    result = measure(Case("copy", {"copy": copy}, bytes=8 * count), repeats=9, memory=False)
    assert result.timings[0].floor is not None
    assert 0.3 < result.timings[0].floor < 3.0


def test_threads_are_set_and_put_back() -> None:
    before, seen = torch.get_num_threads(), []
    measure(Case("threads", {"ours": lambda: partial(lambda: seen.append(torch.get_num_threads()))}), threads=1, repeats=1, memory=False)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_peak_memory_is_what_a_step_allocates() -> None:
    peak = peak_memory(partial(partial, torch.ones, 8_000_000))
    if Path("/proc/self/clear_refs").exists():
        assert peak is not None
        assert 0.9 < peak / (4 * 8_000_000) < 1.2
    else:
        assert peak is None


def test_show_prints_all_that_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    show(measure(Case("sleep", {"ours": partial(sleeper, 0.002), "peer": partial(sleeper, 0.004)}, target=100), repeats=2, memory=False))
    printed = capsys.readouterr().out
    assert "sleep (2 threads, 2 rounds; target 100 missed)" in printed
    assert all(text in printed for text in ("ours", "peer", "ratio to ours", "peak memory"))


def test_a_missing_rich_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"phyla-shared\[bench\]"):
        compare([Case("sleep", {"ours": partial(sleeper, 0.001)})], repeats=1, memory=False)


def test_a_script_measures_in_fresh_processes_and_writes_json(tmp_path: Path) -> None:
    script, out = tmp_path / "bench_square.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "--threads", "1", "--repeats", "3", "--only", "square", "--json", str(out)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    assert "square (1 threads, 3 rounds; target 1000.0 missed)" in printed
    assert "other" not in printed
    written = json.loads(out.read_text())
    assert written["machine"]["torch"] == torch.__version__
    (result,) = written["results"]
    assert (result["case"], result["threads"], result["met"]) == ("square", 1, False)
    assert [timing["name"] for timing in result["timings"]] == ["ours", "doubled"]
    assert result["timings"][0]["floor"] > 0
