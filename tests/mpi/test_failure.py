"""Every way in which ranks can fail, in real jobs: the whole job ends, soon, with the cause and the right exit code."""

import textwrap
import time
import uuid
from pathlib import Path

import pytest

from tests.launching import TimedOut, mpirun, python

WORKER = str(Path(__file__).with_name("worker_failure.py"))
SOON_S = 5.0


def job(kind, who, *more, ranks=2):
    """The finished job, which must have ended soon after the first rank began to fail."""
    run = mpirun(ranks, [WORKER, kind, who, *more], timeout=30)
    began = [float(line.split()[-1]) for line in run.stderr.splitlines() if "begins at" in line]
    if began:
        assert time.time() - began[0] < SOON_S, run.stderr
    return run


@pytest.mark.parametrize("who", [0, 1])
def test_exception_on_one_rank(who):
    run = job("exception", who)
    assert run.returncode == 1
    assert f"[rank {who} host " in run.stderr
    assert "KeyError: 'what went wrong'" in run.stderr and "in fail" in run.stderr


@pytest.mark.parametrize("where", ["thread-waiting", "thread-in-c", "thread-in-mpi"])
def test_exception_in_a_thread(where):
    """While the main thread polls, sits in a C call, or blocks inside MPI."""
    run = job(where, 1)
    assert run.returncode == 1
    assert "[rank 1 host " in run.stderr
    assert "in thread prefetch: Traceback" in run.stderr and "KeyError: 'what went wrong'" in run.stderr


@pytest.mark.parametrize("kind", ["kill", "vanish", "crash"])
def test_rank_that_disappears(kind):
    run = job(kind, 1)
    assert run.returncode != 0
    if kind == "crash":
        assert "Fatal Python error: Segmentation fault" in run.stderr and "in fail" in run.stderr


@pytest.mark.parametrize(("kind", "name", "code"), [
    ("refused", "Refused", 78), ("gave-up", "GaveUp", 70), ("stopped", "Stopped", 75),
])  # fmt: skip
def test_all_ranks_raise_alike(kind, name, code):
    run = job(kind, -1, ranks=3)
    assert run.returncode == code
    assert run.stderr.count(f"{name}: --answer 41 is too small\nuse 42 ({kind})") == 1
    assert "Traceback" not in run.stderr and "bort" not in run.stderr


@pytest.mark.parametrize("who", [0, 1])
def test_refused_on_one_rank(who):
    run = job("refused", who)
    assert run.returncode == 78
    assert f"[rank {who} host " in run.stderr and "Refused: --answer 41 is too small" in run.stderr
    assert "Traceback" not in run.stderr


def test_refused_in_a_thread():
    run = job("thread-refused", 1)
    assert run.returncode == 78
    assert "[rank 1 host " in run.stderr and "in thread prefetch: Refused: a torn data set" in run.stderr


def test_refused_on_one_rank_before_it_joins():
    run = job("early", 1)
    assert run.returncode == 78
    assert "[rank 1 host " in run.stderr and "Refused: this rank fails before MPI_Init" in run.stderr
    assert run.seconds < 3 * SOON_S


def test_rank_that_never_joins():
    run = job("absent", 1)
    assert run.returncode != 0 and run.seconds < 2 * SOON_S
    assert "Timeout (0:00:01)!" in run.stderr and "in connect" in run.stderr


def test_abort_that_gets_stuck():
    run = job("stuck", 1)
    assert run.returncode != 0
    assert "Timeout (0:00:02)!" in run.stderr and "in abort" in run.stderr


def test_exit_on_one_rank():
    run = job("exit", 1)
    assert run.returncode == 1
    assert "SystemExit: a word at the end" in run.stderr


def test_help_on_all_ranks_is_no_failure():
    run = job("help", -1)
    assert run.returncode == 0 and "SystemExit" not in run.stderr


def test_interrupt_on_one_rank():
    assert job("interrupt", 1).returncode == 130


@pytest.mark.parametrize("signal_name", ["term", "usr2"])
def test_signal_on_one_rank_stops_all_at_the_same_step(signal_name):
    run = job("signal", 1, signal_name, ranks=3)
    assert run.returncode == 75
    assert run.stderr.count("Stopped: after step 3 of all, 3") == 1


PROGRAM = """
import sys
from dpresnet import failure
from dpresnet.comm import Solo
from dpresnet.errors import Refused
import threading, time

def body(comm, stop):
    {body}

failure.main(Solo, body)
print("ended well")
"""


def single(body):
    return python(["-c", PROGRAM.replace("{body}", textwrap.indent(textwrap.dedent(body), "    ").lstrip())])


def test_single_process_ends_well():
    run = single("print(stop.requested)")
    assert (run.returncode, run.stdout, run.stderr) == (0, "False\nended well\n", "")


def test_single_process_refuses_in_one_line():
    run = single("raise Refused('--answer 41: use 42')")
    assert (run.returncode, run.stdout, run.stderr) == (78, "", "Refused: --answer 41: use 42\n")


def test_single_process_keeps_python_s_own_traceback():
    run = single("1 / 0")
    assert run.returncode == 1
    assert run.stderr.startswith("Traceback") and run.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_single_process_ends_with_a_failed_thread():
    run = single("threading.Thread(target=lambda: 1 / 0, name='reader').start(); time.sleep(30)")
    assert run.returncode == 1 and run.seconds < SOON_S
    assert "in thread reader: Traceback" in run.stderr and "ZeroDivisionError" in run.stderr


def test_launching_kills_what_hangs():
    """The oracle of the tests above: a job past its limit is reported, and none of its processes is left."""
    mark = uuid.uuid4().hex
    code = "import sys, time; print('started', flush=True); time.sleep(60)"
    with pytest.raises(TimedOut, match=r"ran past 4 s\n--- stdout\nstarted"):
        mpirun(2, ["-c", code, mark], timeout=4)
    limit = time.monotonic() + 5  # killed processes take a moment to go
    while left := [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark in content(p)]:
        assert time.monotonic() < limit, left
        time.sleep(0.05)


def content(path):
    try:
        return path.read_text()
    except OSError:  # the process has just ended
        return ""


def test_launching_hides_an_outer_launcher(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    run = python(["-c", "import os; print([k for k in os.environ if 'SIZE' in k])"])
    assert "PMI" not in run.stdout and run.returncode == 0
