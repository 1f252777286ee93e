"""The parent's end of workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

from dpresnet.bench.channel import Channel
from dpresnet.bench.workload import Facts, Workload
from dpresnet.errors import Refused

LOOK_S = 0.5  # between looks at processes that have not connected yet
NAP_S = 0.01
END_S = 10.0  # a worker that is no longer asked ends by itself in this time
STDERR = 2


class Child:
    """The worker processes of one of the `worker.SIDES`; to be used in a ``with``, after which none of them is left.

    All of them do what they are asked at the same time: by themselves or, with ``mpi``, as the ranks of a job. Between
    requests they sleep in a read. ``arguments`` are those of the side besides the workload.
    """

    def __init__(self, side: str, work: Workload, processes: int = 1, mpi: bool = False, **arguments: object):
        self.side, self.size, self._mpi = side, processes, mpi
        launcher = [mpirun(), "-n", str(processes)] if mpi else []
        self._folder = tempfile.TemporaryDirectory(prefix="dpresnet-")
        self._listener = listen(f"{self._folder.name}/socket", processes)
        job = {"side": side, "work": asdict(work), "arguments": arguments, "folder": self._folder.name, "mpi": mpi,
               "processes": processes}  # fmt: skip
        self._processes = [start(launcher, job | {"rank": rank}) for rank in range(1 if mpi else processes)]
        self._channels: list[Channel] = []  # in the order of the ranks after `hello`
        self._workers: list[int] = []  # descriptors: ranks are no children of this process

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for channel in self._channels:
            channel.close()
        self._listener.close()
        if kind:
            for process in self._processes:
                process.terminate()  # an mpirun takes its ranks along
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for worker in self._workers:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker, signal.SIGKILL)
            os.close(worker)
        self._folder.cleanup()

    def hello(self) -> list[Facts]:
        """Waits until they are built; of each its name, and the bytes it holds with its libraries ("imported") and when
        "built".
        """
        found: dict[Channel, Facts] = {}
        while len(found) < self.size:
            ended = any(process.poll() is not None for process in self._processes)
            waiting = [channel for channel in self._channels if channel not in found]
            ready = wait([self._listener, *waiting], LOOK_S)
            for source in ready:
                if source is self._listener:
                    self._accept()
                else:
                    found[source] = self._read(source)
            if ended and not ready:  # whatever was said before has been read
                raise self._lost()
        self._channels.sort(key=lambda channel: found[channel]["rank"])
        return [found[channel] for channel in self._channels]

    def ask(self, do: str, **arguments: object) -> list[Facts]:
        """The answers of all to one request, in the order of the ranks; raises Refused with its message if one refuses,
        RuntimeError if one is gone.
        """
        for channel in self._channels:
            channel.send({"do": do, **arguments})
        answers: dict[Channel, Facts] = {}
        while len(answers) < self.size:
            for channel in wait([channel for channel in self._channels if channel not in answers]):
                answers[channel] = self._read(channel, self._channels.index(channel))
        return [answers[channel] for channel in self._channels]

    def _accept(self) -> None:
        channel = Channel(self._listener.accept()[0])
        self._channels.append(channel)
        with suppress(ProcessLookupError):
            self._workers.append(channel.peer())

    def _read(self, channel: Channel, rank: int | None = None) -> Facts:
        answer = channel.receive()
        if answer is None:
            raise self._lost(rank)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer

    def _lost(self, rank: int | None = None) -> RuntimeError:
        """What there is to say when a worker is gone: which one, where that is known, and the exit code."""
        chosen = self._processes if self._mpi or rank is None else [self._processes[rank]]
        limit = time.monotonic() + END_S
        while not (codes := [code for process in chosen if (code := process.poll()) is not None]) and time.monotonic() < limit:
            time.sleep(NAP_S)
        who = "the process" if self.size == 1 else f"one of {self.size} processes" if rank is None else f"process {rank}"
        how = f"ended with exit code {codes[0]}" if codes else "is gone"
        return RuntimeError(f"{who} of {self.side} {how}: see its output above")


def mpirun() -> str:
    """The launcher beside this Python, else the one on PATH."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        raise Refused(f"there is no mpirun beside {sys.executable} or on PATH: put that of your MPI library on PATH, or pip "
                      "install 'dpresnet[local]'")  # fmt: skip
    return found


def listen(address: str, processes: int) -> socket.socket:
    """Where workers connect."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(address)
    except OSError as error:
        raise Refused(f"{address} cannot be a socket ({error}): set TMPDIR to another folder, with a shorter path") from None
    listener.listen(processes)
    return listener


def start(launcher: list[str], job: Facts) -> subprocess.Popen:
    """A worker, or the launcher that starts all of them, out of reach of the terminal's Ctrl-C, which is for the parent.

    What they print goes to stderr.
    """
    command = [*launcher, sys.executable, "-m", "dpresnet.bench.worker", json.dumps(job)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=STDERR, start_new_session=True)
