"""A child process of `bench`: builds one side, then answers requests, see `dpresnet.bench.child`.

    python -m dpresnet.bench.worker '{"side": "ours", "work": {...}, ...}'

Requests are {"do": method, ...arguments} of the side, see `SIDES`. Between requests the process sleeps in a read; what its
threads spent meanwhile is part of each answer, so that a side that spins while the other is measured does not go unnoticed.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from dpresnet import environment
from dpresnet.bench.channel import Channel, dial
from dpresnet.bench.workload import Facts, Workload
from dpresnet.comm import Comm, Solo, connect
from dpresnet.errors import GaveUp, Refused
from dpresnet.failure import Guard

SIDES = {
    "ours": ("ours", "Ours"),
    "theirs": ("theirs", "Theirs"),
    "ddp": ("theirs", "Ddp"),
    "our layers": ("our_layers", "OurLayers"),
    "their layers": ("their_layers", "TheirLayers"),
}
OURS = ("ours", "our layers")  # of which OpenCL reads the threads when it is loaded
LEAVE_S = 5.0  # in which all ranks of a job have been told to end, or one never will be


def load(job: Facts, comm: Comm) -> Callable[[], Any]:
    """Imports what the side of a job needs; the result builds it."""
    work, (module, name) = Workload(**job["work"]), SIDES[job["side"]]
    if job["side"] in OURS:
        environment.prepare_rank(comm, work.threads)
    side = getattr(importlib.import_module(f"dpresnet.bench.{module}"), name)
    return lambda: side(work, **together(job, comm), **job["arguments"])


def together(job: Facts, comm: Comm) -> Facts:
    """What a side has to know of the other processes that train with it."""
    if job["side"] == "ours":
        return {"comm": comm}
    if job["side"] == "ddp":
        return {"rank": job["rank"], "size": job["processes"], "store": f"{job['folder']}/store"}
    return {}


def resident() -> int:
    """Bytes of main memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Bytes of main memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(job: Facts, comm: Comm, channel: Channel) -> None:
    """Builds the side, then answers requests until the parent closes the channel."""
    build = load(job, comm)
    imported = resident()
    side = build()
    rank = comm.rank if job["mpi"] else job["rank"]
    channel.send({"name": side.name, "mpi": comm.mpi_library, "rank": rank, "imported": imported, "built": resident()})
    wall, cpu = time.perf_counter(), time.process_time()
    while request := channel.receive():
        waited = {"waited_s": time.perf_counter() - wall, "waited_cpu_s": time.process_time() - cpu}
        answer = getattr(side, request.pop("do"))(**request)
        channel.send(answer | waited | {"peak": peak()})
        wall, cpu = time.perf_counter(), time.process_time()


def main() -> None:
    """Serves one job, by itself or as one of its ranks; what it refuses goes to the parent as {"refused": message}."""
    job = json.loads(sys.argv[1])
    channel = dial(f"{job['folder']}/socket")
    with Guard(None if job["mpi"] else Solo()) as guard:
        try:
            guard.comm = guard.comm or connect()
            serve(job, guard.comm, channel)
        except (Refused, GaveUp) as error:
            channel.send({"refused": str(error)})
        if guard.comm and guard.comm.farewell(b"end", LEAVE_S) is None:
            guard.comm.abort(1)  # another rank waits for this one, in the midst of a request


if __name__ == "__main__":
    main()
