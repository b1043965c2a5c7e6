import os

import pytest

from phyla.bench import pipelines
from phyla.bench.sandbox import TrialFailed, run_fresh


@pytest.fixture
def fake(fakes):
    """The function of a fake pipeline's trial."""
    return lambda pipeline, name: getattr(__import__(f"phyla.bench.pipelines.{pipeline}", fromlist=[name]), name)


def test_a_fresh_process_with_its_own_threads(fake):
    seen = []
    first = run_fresh(fake("facts", "facts"), 1, seen.append, floats=1)
    second = run_fresh(fake("facts", "facts"), 2, seen.append, floats=1)
    assert (first.value[0], second.value[0]) == (1, 2)
    assert len({first.value[1], second.value[1], os.getpid()}) == 3
    assert seen == [0.25, 0.5, 0.75] * 2


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the system does not tell a process's peak memory")
def test_peak_memory_is_that_of_the_trial(fake):
    small, large, small_again = (run_fresh(fake("facts", "facts"), 1, id, floats=n * 2**18).peak_mib for n in (1, 64, 1))
    assert 60 < large - small < 70  # 64 MiB against 1 MiB
    assert abs(small_again - small) < 8


def test_what_a_trial_raises_comes_back_with_its_traceback(fake):
    with pytest.raises(TrialFailed, match=r"(?s)in fail.*ArithmeticError: the sum does not add up"):
        run_fresh(fake("broken", "fail"), 1, id)


def test_a_dead_process_is_named_by_its_signal(fake):
    with pytest.raises(TrialFailed, match=r"crash\.die: the process died \(SIGSEGV\)"):
        run_fresh(fake("crash", "die"), 1, id)


def test_pipelines_are_the_files_of_the_folder(fakes):
    assert pipelines.names() == ("broken", "crash", "facts", "good", "slow", "stopped")


def test_the_real_pipelines_are_found_without_a_list():
    assert {"curves", "images"} <= set(pipelines.names())
