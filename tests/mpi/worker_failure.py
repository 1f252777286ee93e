"""One rank of test_failure.py. Arguments: what goes wrong, on which rank (-1: all), while the others wait for it."""

import os
import signal
import sys
import threading
import time

import numpy as np

from dpresnet import comm as communication
from dpresnet import failure
from dpresnet.buckets import TreeAllreduce
from dpresnet.comm import connect
from dpresnet.errors import GaveUp, Refused, Stopped

KIND, WHO = sys.argv[1], int(sys.argv[2])
PLANNED = {"refused": Refused, "gave-up": GaveUp, "stopped": Stopped}


def launcher_rank():
    return int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])


def raise_in_thread(error):
    def fail():
        time.sleep(0.2)  # by now the main thread is where it waits
        raise error

    threading.Thread(target=fail, name="prefetch", daemon=True).start()


def fail(comm):
    if KIND in PLANNED:
        raise PLANNED[KIND](f"--answer 41 is too small\nuse 42 ({KIND})")
    if KIND == "exception":
        raise KeyError("what went wrong")
    if KIND == "exit":
        sys.exit("a word at the end")
    if KIND == "help":
        sys.exit(0)
    if KIND == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "vanish":
        os._exit(3)
    if KIND == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if KIND.startswith("thread-"):
        raise_in_thread(Refused("a torn data set") if KIND == "thread-refused" else KeyError("what went wrong"))
    if KIND == "stuck":
        stuck_abort(comm)
    if KIND == "thread-in-c":
        time.sleep(1e6)
    if KIND == "thread-in-mpi":
        comm._comm.recv(source=comm.rank)  # blocks inside MPI, as no method of ours does
    comm.allgather(np.zeros(1))


def stuck_abort(comm):
    """MPI_Abort never returns and ends nothing."""

    class Stuck:
        class COMM_WORLD:
            Abort = time.sleep

    comm._mpi = Stuck
    comm.abort(1_000_000)


def outstanding(comm):
    """Leaves a sum under way, on all ranks."""
    n = 100_000
    reduce = TreeAllreduce(comm, comm.size, [slice(0, n)])
    reduce.start(0, [np.ones(n, np.float32)], np.empty(n, np.float32))
    return reduce


def body(comm, stop):
    comm.barrier()
    if KIND == "signal":
        wait_for_signal(comm, stop)
    reduce = outstanding(comm)
    if comm.rank == WHO or WHO < 0:
        print(f"begins at {time.time()}", file=sys.stderr, flush=True)
        fail(comm)
    del reduce
    comm.allgather(np.zeros(1))  # for ever: not all come
    time.sleep(1e6)


def wait_for_signal(comm, stop):
    """What a training loop does: agree on the flag in each step, and end together."""
    number = signal.SIGUSR2 if sys.argv[3:] == ["usr2"] else signal.SIGTERM
    for step in range(1000):
        if step == 3 and comm.rank == WHO:
            os.kill(os.getpid(), number)
        if comm.agree([stop.requested])[0]:
            steps = comm.gather(step)
            raise Stopped(f"after step {min(steps)} of all, {max(steps)}")
        time.sleep(0.01)


def join():
    if KIND == "early" and launcher_rank() == WHO:
        raise Refused("this rank fails before MPI_Init")
    if KIND == "absent":
        communication.JOIN_LIMIT_S = 1
        time.sleep(1e6 if launcher_rank() == WHO else 0)
    return connect()


failure.main(join, body)
