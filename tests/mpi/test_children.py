"""Workers of the measurements: they answer in the order of their ranks, sleep in between, and none is left or missed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launching import OPEN_MPI, remove_shared_memory, sleeps_between_turns, workers

from dpresnet.bench import child as children
from dpresnet.bench.child import Child
from dpresnet.bench.workload import Workload
from dpresnet.errors import Refused

WORK = Workload("resnet20", image=8, batch=2)
FOREVER = 10**9  # steps
SOON_S = 0.5
HOW = pytest.mark.parametrize(("size", "mpi"), [(1, False), (2, False), (2, True)], ids=["one", "apart", "job"])


@pytest.fixture(autouse=True)
def any_mpi(monkeypatch):
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    yield
    remove_shared_memory()


def wait_for(done, limit=20):
    until = time.monotonic() + limit
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)


def later(action):
    """While this process waits for an answer."""
    timer = threading.Timer(SOON_S, action)
    timer.start()
    return timer


@HOW
def test_all_answer_in_the_order_of_their_ranks_and_none_is_left(size, mpi):
    with Child("ours", WORK, size, mpi) as child:
        assert [found["rank"] for found in child.hello()] == list(range(size))
        assert [len(answer["seconds"]) for answer in child.ask("run", steps=2)] == [2] * size
        serving = workers(child._folder.name)
        assert len(serving) >= size
        began = time.monotonic()
    assert time.monotonic() - began < children.END_S, "they end by themselves"
    assert [process.returncode for process in child._processes] == [0] * len(child._processes)
    assert workers(child._folder.name) == [] and not Path(child._folder.name).exists()


WORKER = """
import sys, time
from dpresnet.bench.channel import dial
_, folder, rank = sys.argv
channel = dial(f"{folder}/socket")
time.sleep(0.4 * (rank == "0"))
channel.send({"rank": int(rank)})
while channel.receive():
    time.sleep(0.4 * (rank == "0"))
    channel.send({"answer": f"of {rank}"})
"""


def test_the_order_is_not_that_in_which_they_speak(monkeypatch):
    def start(launcher, job):
        return subprocess.Popen([sys.executable, "-c", WORKER, job["folder"], str(job["rank"])])

    monkeypatch.setattr(children, "start", start)
    with Child("ours", WORK, 3) as child:
        assert [found["rank"] for found in child.hello()] == [0, 1, 2]
        assert [found["answer"] for found in child.ask("anything")] == ["of 0", "of 1", "of 2"]


@HOW
def test_waiting_takes_no_time_of_a_core(size, mpi):
    with Child("ours", WORK, size, mpi) as child:
        sleeps_between_turns(child)


@HOW
def test_a_child_refuses_with_its_reason(size, mpi):
    nowhere = Workload(device="none such")
    with pytest.raises(Refused, match="no device has that in its name"), Child("ours", nowhere, size, mpi) as child:
        child.hello()
    assert workers(child._folder.name) == []


@HOW
def test_a_child_that_dies_in_its_turn_is_no_silence(size, mpi):
    """The last of them: the others would go on for ever."""
    said = r"process( \d)? of ours ended with exit code -?\d+: see its output above"
    with pytest.raises(RuntimeError, match=said), Child("ours", WORK, size, mpi) as child:
        child.hello()
        last = workers(child._folder.name)[-1]
        timer = later(lambda: os.kill(last, signal.SIGKILL))
        began = time.monotonic()
        child.ask("run", steps=FOREVER)
    timer.join()
    assert time.monotonic() - began < SOON_S + children.END_S
    assert workers(child._folder.name) == []


@pytest.mark.parametrize("mpi", [False, True], ids=["apart", "job"])
def test_a_child_that_dies_before_it_is_built_is_no_silence(mpi):
    with pytest.raises(RuntimeError, match="of ours ended with exit code 1"), Child("ours", WORK, 2, mpi, nonsense=1) as child:
        child.hello()
    assert workers(child._folder.name) == []


def test_a_launcher_that_ends_before_anyone_connects_is_no_silence(tmp_path, monkeypatch):
    launcher = tmp_path / "mpirun"
    launcher.write_text("#!/bin/sh\nexit 7\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(children, "mpirun", lambda: str(launcher))
    said = "one of 2 processes of ours ended with exit code 7"
    with pytest.raises(RuntimeError, match=said), Child("ours", WORK, 2, mpi=True) as child:
        child.hello()


def test_a_failure_elsewhere_ends_those_that_compute():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests in the background may have it ignored

    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), Child("ours", WORK, 2, mpi=True) as child:
        child.hello()
        later(interrupt)
        child.ask("run", steps=FOREVER)
    assert workers(child._folder.name) == []


STUBBORN = """#!/bin/sh
trap '' TERM
shift 2
setsid "$@" &
setsid "$@" &
wait
"""


def test_ranks_are_killed_that_their_launcher_leaves_behind(tmp_path, monkeypatch):
    launcher = tmp_path / "mpirun"
    launcher.write_text(STUBBORN)
    launcher.chmod(0o755)
    monkeypatch.setattr(children, "mpirun", lambda: str(launcher))
    monkeypatch.setattr(children, "END_S", 0.5)
    with pytest.raises(ZeroDivisionError), Child("ours", WORK, 2, mpi=True) as child:
        child.hello()
        for channel in child._channels:
            channel.send({"do": "run", "steps": FOREVER})
        time.sleep(SOON_S)
        raise ZeroDivisionError
    assert [process.returncode for process in child._processes] == [-signal.SIGKILL]
    wait_for(lambda: not workers(child._folder.name), limit=5)


PARENT = """
import sys
from dpresnet.bench.child import Child
from dpresnet.bench.workload import Workload
child = Child("ours", Workload("resnet20", image=8, batch=2), 2, mpi=sys.argv[1] == "job")
child.hello()
child._channels[0].send({"do": "run", "steps": 50})  # and nothing to the other: as if killed in between
print(child._folder.name, flush=True)
input()
"""


@pytest.mark.parametrize("how", ["apart", "job"])
def test_none_outlives_a_parent_that_was_killed(how, tmp_path):
    """Rank 0 waits for rank 1, which was asked for nothing."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"TMPDIR": str(tmp_path)})  # fmt: skip
    with parent:
        folder = parent.stdout.readline().strip()
        assert len(workers(folder)) >= 2
        parent.kill()
    wait_for(lambda: not workers(folder))


def test_mpirun_is_the_one_beside_python_or_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(Refused, match=r"no mpirun beside .*python or on PATH: .* pip install 'dpresnet\[local\]'"):
        children.mpirun()
    for folder in (tmp_path / "bin", tmp_path):
        folder.mkdir(exist_ok=True)
        (folder / "mpirun").touch(0o755)
        assert children.mpirun() == str(folder / "mpirun")


def test_a_folder_that_no_socket_fits_in_is_refused(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 108)
    deep.mkdir()
    monkeypatch.setattr(children.tempfile, "tempdir", str(deep))
    with pytest.raises(Refused, match=r"cannot be a socket .* set TMPDIR to another folder"):
        Child("ours", WORK)
