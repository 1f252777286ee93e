"""How a run ends: on all ranks, within seconds, with the cause, who met it, and an exit code that launchers can read.

Left to itself, MPI hangs when one rank fails: the others wait for it in a collective, and it waits for them in
MPI_Finalize. So a rank that meets an unexpected exception prints it and aborts the job. The planned ends (``errors``)
are mostly raised by all ranks alike; then the message is printed once and each rank leaves through the ordinary exit.
"""

import faulthandler
import hashlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn, Self

from dpresnet.comm import Comm, Solo, connect
from dpresnet.errors import GaveUp, Refused, Stopped

PLANNED = (Refused, GaveUp, Stopped)
PATIENCE_S = 2.0  # for the other ranks to raise the same
SAVE_PATIENCE_S = 600.0  # the same after a stop, when rank 0 may still be writing the checkpoint
INTERRUPTED = 130  # as a shell reports Ctrl-C


def main(join: Callable[[], Comm], body: Callable[[Comm, "StopFlag"], None]) -> None:
    """Run a whole program: ``body(join(), stop)``, with every failure on any rank and in any thread ending all ranks.

    Returns when the body does. Otherwise the process ends with the exit code of the failure, see Guard.
    """
    with Guard() as job:
        job.comm = join()
        body(job.comm, StopFlag().listen())


class Guard:
    """``with Guard() as job: job.comm = connect(); ...`` around a whole program.

    An exception that leaves the block, or a thread meanwhile, ends all ranks:

    * Refused, GaveUp, Stopped: one line and the error's exit code. If all ranks raise the same, it is printed once and
      MPI is finalised; if the others do something else instead, the job is aborted with this code.
    * anything else: rank, host and traceback, and the job is aborted with code 1.

    A single process just raises, as any Python program does, or exits with the planned code.
    """

    def __init__(self, comm: Comm | None = None) -> None:
        self.comm = comm

    def __enter__(self) -> Self:
        faulthandler.enable(file=2)  # a crash in a driver says where it was called from
        self._former_hook = threading.excepthook
        threading.excepthook = self._thread_failed
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        threading.excepthook = self._former_hook
        if error is None or (isinstance(error, SystemExit) and not error.code):
            return
        comm = self._reach_the_others()
        if isinstance(error, PLANNED):
            _leave(comm, error)
        if comm.size > 1:
            _abort(comm, error)

    def _reach_the_others(self) -> Comm:
        """The communicator, connected now if need be: a rank that ends before MPI_Init may leave the others in it."""
        if self.comm is None:
            try:
                self.comm = connect()
            except Refused:  # most likely the very error that is being reported
                self.comm = Solo()
        return self.comm

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        if failed.exc_type is SystemExit:
            return
        _abort(self.comm or Solo(), failed.exc_value or failed.exc_type(), failed.thread)


def _leave(comm: Comm, error: Refused | GaveUp | Stopped) -> NoReturn:
    """Exit together with the other ranks if they end for a planned reason too, else abort them."""
    line = f"{type(error).__name__}: {error}"
    word = hashlib.sha256(line.encode()).digest()
    words = comm.farewell(word, SAVE_PATIENCE_S if isinstance(error, Stopped) else PATIENCE_S)
    if words is None:
        _say(_signed(comm, line))
        comm.abort(error.exit_code)
    if words.index(word) == comm.rank:
        _say(line if len(set(words)) == 1 else _signed(comm, line))
    raise SystemExit(error.exit_code) from None


def _abort(comm: Comm, error: BaseException, thread: threading.Thread | None = None) -> NoReturn:
    """Print what happened and end all ranks; from any thread."""
    if isinstance(error, (*PLANNED, KeyboardInterrupt, SystemExit)):
        text = f"{type(error).__name__}: {error}"
    else:
        text = "".join(traceback.format_exception(error))
    _say(_signed(comm, f"in thread {thread.name}: {text}" if thread else text))
    comm.abort(_exit_code(error))


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return getattr(error, "exit_code", 1)


def _signed(comm: Comm, text: str) -> str:
    """``text`` with rank and host before each line, for the output of several ranks may be interleaved."""
    return "\n".join(f"[rank {comm.rank} host {comm.host}] {line}" for line in text.rstrip().splitlines())


def _say(text: str) -> None:
    """In one write, after everything printed before."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class StopFlag:
    """``requested`` once SIGTERM or SIGUSR2 has arrived: batch systems send these; SIGUSR1 is MPICH's own.

    The handler does nothing else. The training loop lets all ranks agree on the flag, saves, and raises Stopped.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> Self:
        """From now on; call it in the main thread and after ``connect()``, because MPI_Init may set handlers itself."""
        for number in self.SIGNALS:
            signal.signal(number, self._set)
        return self

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
