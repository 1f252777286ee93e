"""What the ranks say to each other: MPI behind a dozen methods, and the same methods for a process that is alone.

``connect()`` gives a ``World`` (MPI) or a ``Solo`` (one process, mpi4py never imported). A process that no MPI launcher
started is alone: asking MPI instead would mean MPI_Init, which a cluster's login node may refuse or hang in.

No method blocks inside MPI. Every operation is *started* and then polled until it is done, which buys three things:
ranks that wait leave the cores to ranks that compute (there may be more ranks than cores), signal handlers run while
waiting, and MPI is free for the moment in which another thread has to end the job. All methods belong to the main
thread; only ``abort`` may be called from any.

Python objects travel between the ranks of a job by pickle; nothing that is read from a file is ever unpickled.
"""

import faulthandler
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dpresnet.errors import Late, Refused
from dpresnet.events import GAVE_UP, Event, Note, Ring, Traffic, describe, missing, read
from dpresnet.launcher import Launch, join, launched, library
from dpresnet.shared import Arrival, Shared, accept, offer, whole_bytes

JOIN_LIMIT_S = 300.0  # all ranks have entered MPI_Init by then, or one never will
DELIVERY_S = 0.3  # what a rank prints before an abort reaches the launcher in this time, if at all
ABORT_LIMIT_S = 2.0  # an abort takes no longer, or the process just ends
SPIN_S = 2e-4  # poll this long at full speed, longer than a small message takes
BULK_SPIN_S = 1.0  # the same while MPI moves large messages: each poll moves a piece of them, and small ones come after
LARGE_BYTES = 2**16
NAP_S = 5e-5  # then between naps of this length
STOPPED_S = 1.0  # longer between two looks, and the process itself has been stopped for a while: that is nobody's delay
LOOK_LIMIT_S = 10.0  # a folder that does not answer must not keep a rank from ending

Level = list[list[int]]  # the ranks of every group that sums at the same time

yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


def wait_until(done: Callable[[], bool], spin: float = SPIN_S, late: Callable[[float], None] = lambda seconds: None) -> None:
    """Poll ``done`` until it holds, at full speed for ``spin`` seconds, then with naps and calls of ``late(seconds so far)``.

    Yielding the core in between is what makes more ranks than cores workable: polling without it lets the ranks that
    wait eat the time slices of those they wait for (1 KiB among 4 ranks on 2 cores: 10 ms instead of 0.05 ms). It also
    beats ``time.sleep(0)``, which takes 50 us on Linux.
    """
    last, seconds = time.perf_counter(), 0.0
    while not done():
        now = time.perf_counter()
        seconds, last = seconds + min(now - last, STOPPED_S), now
        if seconds < spin:
            yield_core()
        else:
            late(seconds)
            time.sleep(NAP_S)


def connect(debug: bool = False) -> "Comm":
    """The communicator of this process; collective over the ranks of a job.

    Refused if the launcher started several processes but MPI cannot be loaded or joins none of them, or with ``debug``.
    """
    launch = launched()
    if debug and launch and launch.size > 1:
        raise Refused(f"--debug runs in a single process, but {launch.name} started {launch.size}: leave it out")
    alone = launch is None or launch.size == 1
    if debug or (alone and "mpi4py.MPI" not in sys.modules):
        return Solo()
    faulthandler.dump_traceback_later(JOIN_LIMIT_S, exit=True, file=2)
    try:
        return World(launch or Launch("the environment", 0, 0))
    finally:
        faulthandler.cancel_dump_traceback_later()


class Solo:
    """One process: every collective is the identity."""

    rank, size, local_rank, local_size = 0, 1, 0, 1
    groups: Sequence["Group"] = ()
    timeout = 0.0
    traffic = Traffic()

    def __init__(self) -> None:
        self.events = Ring()
        self.host = socket.gethostname()
        self.mpi_library = "none (one process)"

    def keep_events(self, folder: Path) -> None:
        pass

    def wait_until(self, done: Callable[[], bool], spin: float = SPIN_S) -> None:
        wait_until(done, spin)

    def allgather(self, a: np.ndarray) -> np.ndarray:
        return np.array(a)[None]

    def agree(self, flags: np.ndarray | Sequence[int]) -> np.ndarray:
        return np.array(flags, np.int64)

    def bcast(self, obj: Any) -> Any:
        return obj

    def gather(self, obj: Any) -> list[Any]:
        return [obj]

    def barrier(self) -> None:
        pass

    def node_barrier(self) -> None:
        pass

    def share(self, nbytes: int) -> None: ...

    def start_allreduce(self, values: np.ndarray, what: str = "") -> "Done":
        return Done()

    def farewell(self, word: bytes, patience: float) -> list[bytes] | None:
        return [word]

    def abort(self, code: int) -> NoReturn:
        os._exit(code)


class Done:
    """The request of an operation that was finished when it was started."""

    def test(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Request:
    """A started operation. Its arrays must stay untouched until ``test`` has said True."""

    def __init__(self, request: Any, world: "World", note: Note, large: bool) -> None:
        self._request, self._world, self._note, self._large = request, world, note, large
        self._done = False

    def test(self) -> bool:
        if not self._done:
            with self._world.lock:
                self._done = self._request.Test()
            if self._done:
                self._world.ended(self._note, self._large)
        return self._done

    def wait(self) -> None:
        self._world.wait_until(self.test, BULK_SPIN_S if self._world.large else SPIN_S)


def levels(nodes: Sequence[int]) -> list[Level]:
    """Who sums with whom, from the node of every rank: first the ranks of a node, then those in the same place on all nodes,
    so that a node sends each of its sums once.

    All at once where that saves nothing (one node, or one rank on each), or where nodes hold different numbers of ranks.
    """
    members: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    within = list(members.values())
    sizes = {len(ranks) for ranks in within}
    if len(within) > 1 and len(sizes) == 1 and sizes != {1}:
        return [within, [sorted(ranks) for ranks in zip(*within, strict=True)]]
    return [[list(range(len(nodes)))]] if len(nodes) > 1 else []


class Group:
    """``ranks`` of a job that sum among themselves: number ``mine`` of the groups of a ``level``, which all do the same.

    All-to-alls and all-gathers have a communicator and a channel each. An operation has one number on all ranks of the job
    (see `dpresnet.events`), so every group has to start as many as the others.
    """

    def __init__(self, world: "World", comm: Any, level: Level, mine: int, suffix: str, where: str) -> None:
        self._start, self._alltoall, self._allgather = world.start, comm, comm.Dup()
        self._suffix, self._where = suffix, where
        self.level, self.ranks = level, level[mine]
        self.rank, self.size = comm.rank, comm.size

    def start_alltoall(
        self, send: np.ndarray, send_counts: Sequence[int], recv: np.ndarray, recv_counts: Sequence[int], what: str = ""
    ) -> Request:
        """Start giving ``send_counts[i]`` bytes of ``send`` (uint8) to ``ranks[i]``, and taking ``recv_counts[i]``."""
        arrays = [send, send_counts], [recv, recv_counts]
        sent = send.nbytes - send_counts[self.rank]
        return self._begin("alltoall", self._alltoall.Ialltoallv, arrays, send.nbytes, sent, what)

    def start_allgather(self, send: np.ndarray, recv: np.ndarray, recv_counts: Sequence[int], what: str = "") -> Request:
        """Start joining the bytes ``send`` of all ranks, ``recv_counts[i]`` from ``ranks[i]``, in ``recv`` (both uint8)."""
        arrays = send, [recv, recv_counts]
        sent = send.nbytes * (self.size - 1)
        return self._begin("allgather", self._allgather.Iallgatherv, arrays, send.nbytes, sent, what)

    def start_shared(self, kind: str, shared: Shared, counter: int, nbytes: int, what: str) -> Request:
        """Tell the others, who share memory with this rank, that ``nbytes`` are ready for each of them, and wait for theirs."""
        return self._begin(kind, shared.reach, (counter,), nbytes, nbytes * (self.size - 1), what)

    def _begin(self, kind: str, operation: Callable[..., Any], arrays: tuple, nbytes: int, sent: int, what: str) -> Request:
        return self._start(kind + self._suffix, operation, *arrays, nbytes=nbytes, sent=sent, what=what + self._where)


class World:
    """The ranks of an MPI job. Arrays are C-contiguous; operations of one kind start in the same order on all ranks.

    Each kind of operation that may be under way at the same time has a communicator of its own, because MPI matches
    collectives by the order in which they start on a communicator. ``lock`` is held for each (short) MPI call: MPI is
    initialised with MPI_THREAD_SERIALIZED, and ``abort`` may come from another thread.

    ``groups``: with whom this rank sums, in turn; with nobody if it is alone.

    ``timeout``: a rank that waits longer, in seconds, says for what and for whom, and fails; 0: it waits for ever.
    """

    def __init__(self, launch: Launch) -> None:
        mpi = join(launch)
        self._mpi = mpi
        self.lock = threading.Lock()
        self.events, self.timeout, self._folder = Ring(), 0.0, None
        self._sent_bytes, self._active_s, self._waited_s = 0, 0.0, 0.0
        self._under_way, self.large, self._since = 0, 0, 0.0  # operations, MPI's large ones of them; since when there are any
        self._comm, self._allreduce, self._exit = (mpi.COMM_WORLD.Dup() for _ in range(3))
        self._node = self._comm.Split_type(mpi.COMM_TYPE_SHARED)
        self.rank, self.size = self._comm.rank, self._comm.size
        self.local_rank, self.local_size = self._node.rank, self._node.size
        self.groups = self._own_groups(self._comm.allgather(self._node.bcast(self.rank)))  # a node by its first rank
        self.host = socket.gethostname()
        self.mpi_library = library(mpi)

    def _own_groups(self, nodes: Sequence[int]) -> list[Group]:
        """The group of this rank on each level."""
        divisions = levels(nodes)
        words = [("-1", " within the node"), ("-2", " between nodes")] if len(divisions) > 1 else [("", "")]
        groups = []
        for level, (suffix, where) in zip(divisions, words, strict=False):  # a single rank has no level
            mine = next(i for i, ranks in enumerate(level) if self.rank in ranks)
            groups.append(Group(self, self._comm.Split(mine), level, mine, suffix, where))
        return groups

    def start(
        self, channel: str, operation: Callable[..., Any], *arguments: Any, nbytes: int = 0, sent: int = 0, what: str = ""
    ) -> Request:
        """Start an MPI operation with a message of ``nbytes``, of which ``sent`` go to others, counted once for each."""
        self._sent_bytes += sent
        note = self.events.begin(channel, nbytes, what)
        if not self._under_way:
            self._since = time.perf_counter()
        self._under_way += 1
        with self.lock:
            request = operation(*arguments)
        large = nbytes >= LARGE_BYTES and not isinstance(request, Arrival)
        self.large += large
        return Request(request, self, note, large)

    def ended(self, note: Note, large: bool) -> None:
        """An operation is done."""
        self.events.end(note)
        self.large -= large
        self._under_way -= 1
        if not self._under_way:
            self._active_s += time.perf_counter() - self._since

    @property
    def traffic(self) -> Traffic:
        """Up to now; of operations under way only what they send."""
        return Traffic(self._sent_bytes, self._active_s, self._waited_s)

    def keep_events(self, folder: Path) -> None:
        """What this rank says to others is noted in a file of ``folder`` from now on, see `dpresnet.events`."""
        with suppress(OSError):  # then in memory only
            self.events.keep(folder, self.rank, self.size, self.host)
            self._folder = folder

    def wait_until(self, done: Callable[[], bool], spin: float = SPIN_S) -> None:
        """`wait_until`, for other ranks: not longer than the time limit, and counted in ``traffic``."""
        began = time.perf_counter()
        wait_until(done, spin, self.late)
        self._waited_s += time.perf_counter() - began

    def late(self, seconds: float) -> None:
        """To be called while waiting: raises Late beyond the time limit, after the stacks of all threads."""
        if not self.timeout or seconds < self.timeout or not (waiting := self.events.waiting()):
            return
        faulthandler.dump_traceback(file=2, all_threads=True)
        event, who = self._missing(waiting)
        self.events.end(self.events.begin(GAVE_UP, 0))  # so that the ring tells until when this rank has waited
        raise Late(f"waited {seconds:.0f} s for {event}; {who}; the limit is {self.timeout:.0f} s, see --timeout")

    def _missing(self, waiting: list[Event]) -> tuple[Event, str]:
        """The last operation under way that some ranks have not started, and where those stand, as their rings say."""
        faulthandler.dump_traceback_later(LOOK_LIMIT_S, exit=True, file=2)
        ranks = []
        with suppress(OSError):
            ranks = read(self._folder) if self._folder else []
        faulthandler.cancel_dump_traceback_later()
        for event in reversed(waiting):
            if absent := missing(ranks, event):
                return event, f"not there: {'; '.join(describe(rank, time.time()) for rank in absent)}"
        if not ranks:
            return waiting[-1], "who is missing cannot be seen"
        silent = sorted(set(range(self.size)) - {rank.rank for rank in ranks})
        return waiting[-1], f"not there: rank {', '.join(map(str, silent))}" if silent else "all are there: look at the network"

    def allgather(self, a: np.ndarray) -> np.ndarray:
        """``a`` (same shape and dtype on all ranks) of every rank, as [size, *a.shape]."""
        a = np.asarray(a, order="C")
        out = np.empty((self.size, *a.shape), a.dtype)
        self.start("exchange", self._comm.Iallgather, a, out, nbytes=a.nbytes, sent=a.nbytes * (self.size - 1)).wait()
        return out

    def agree(self, flags: np.ndarray | Sequence[int]) -> np.ndarray:
        """The maximum over the ranks of each of the integers ``flags``."""
        flags = np.asarray(flags, np.int64, order="C")
        out = np.empty_like(flags)
        self.start("exchange", self._comm.Iallreduce, flags, out, self._mpi.MAX).wait()
        return out

    def bcast(self, obj: Any) -> Any:
        """Rank 0's ``obj`` (anything that pickles) on all ranks."""
        data = np.frombuffer(pickle.dumps(obj if self.rank == 0 else None, protocol=5), np.uint8)
        size = np.array([data.size])
        self.start("exchange", self._comm.Ibcast, size, 0, nbytes=size.nbytes).wait()
        data = data.copy() if self.rank == 0 else np.empty(size[0], np.uint8)
        self.start("exchange", self._comm.Ibcast, data, 0, nbytes=data.nbytes).wait()
        return obj if self.rank == 0 else pickle.loads(data)

    def gather(self, obj: Any) -> list[Any]:
        """Every rank's ``obj`` (anything that pickles), in rank order, on all ranks."""
        data = np.frombuffer(pickle.dumps(obj, protocol=5), np.uint8)
        sizes = self.allgather(np.array(data.size)).tolist()
        padded = np.zeros(max(sizes), np.uint8)
        padded[: data.size] = data
        return [pickle.loads(row[:size]) for row, size in zip(self.allgather(padded), sizes, strict=True)]

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self.start("exchange", self._comm.Ibarrier).wait()

    def node_barrier(self) -> None:
        """Returns when all ranks that share memory with this one have called it."""
        self.start("node", self._node.Ibarrier).wait()

    def share(self, nbytes: int) -> Shared | None:
        """Memory of ``nbytes`` (whole pages) for each rank of this node, in common with the others; collective over the job.

        None unless all ranks get some, and the ranks of a node sum among themselves first.
        """
        if self.size == 1 or len(self.groups[0].ranks) != self.local_size:
            return None
        total, address, found = whole_bytes(self.local_size, nbytes), np.full(2, -1), None
        with suppress(OSError):  # then all do without
            if self.local_rank == 0:
                address[:] = os.getpid(), offer(total)
        self.start("node", self._node.Ibcast, address, 0).wait()
        with suppress(OSError):
            found = Shared(accept(*address, total), self.local_rank, self.local_size)
        failed = self.agree([found is None])[0]
        if self.local_rank == 0 and address[1] >= 0:
            os.close(address[1])
        return None if failed else found

    def start_allreduce(self, values: np.ndarray, what: str = "") -> Request:
        """Start adding the float32 ``values`` of all ranks, in place, in an order that the MPI library chooses."""
        sent = 2 * values.nbytes * (self.size - 1) // self.size
        arguments = self._mpi.IN_PLACE, values, self._mpi.SUM
        return self.start("allreduce", self._allreduce.Iallreduce, *arguments, nbytes=values.nbytes, sent=sent, what=what)

    def farewell(self, word: bytes, patience: float) -> list[bytes] | None:
        """The words (of equal length) of all ranks, or None if not all say one within ``patience`` seconds."""
        words = np.empty((self.size, len(word)), np.uint8)
        request = self.start("farewell", self._exit.Iallgather, np.frombuffer(word, np.uint8), words)
        limit = time.perf_counter() + patience
        wait_until(lambda: request.test() or time.perf_counter() > limit)
        return [row.tobytes() for row in words] if request.test() else None

    def abort(self, code: int) -> NoReturn:
        """End all ranks at once, with exit code ``code`` where the launcher passes it on. From any thread.

        The lock makes the call lawful while the main thread polls. Should MPI be stuck all the same, a C thread that
        needs neither the lock nor the interpreter ends this process, and the launcher then ends the others. The delay
        saves the last words: launchers drop what they have not read from a rank when it aborts.
        """
        faulthandler.dump_traceback_later(ABORT_LIMIT_S, exit=True, file=2)
        time.sleep(DELIVERY_S)
        self.lock.acquire(timeout=ABORT_LIMIT_S / 2)
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)


Comm = Solo | World
