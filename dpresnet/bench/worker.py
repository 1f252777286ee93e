"""A child process of `bench`: builds one side, then answers requests, one JSON object per line.

    python -m dpresnet.bench.worker '{"side": "ours", "work": {...}}'

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
from typing import Any, TextIO

from dpresnet import environment
from dpresnet.bench.workload import Facts, Workload
from dpresnet.errors import GaveUp, Refused

SIDES = {
    "ours": ("ours", "Ours"),
    "theirs": ("theirs", "Theirs"),
    "our layers": ("our_layers", "OurLayers"),
    "their layers": ("their_layers", "TheirLayers"),
}
OURS = ("ours", "our layers")  # of which OpenCL reads the threads when it is loaded; the others are given their variants


def load(job: Facts) -> Callable[[], Any]:
    """Imports what the side of a job needs; the result builds it."""
    work, (module, name) = Workload(**job["work"]), SIDES[job["side"]]
    ours = job["side"] in OURS
    if ours:
        environment.prepare(work.threads, 0, 1)
    side = getattr(importlib.import_module(f"dpresnet.bench.{module}"), name)
    return lambda: side(work) if ours else side(work, job["variants"])


def resident() -> int:
    """Bytes of main memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Bytes of main memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_stdout() -> TextIO:
    """The channel to the parent; whatever else is printed goes to stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def serve(job: Facts, channel: TextIO) -> None:
    """Builds the side, then answers requests until stdin ends."""
    build = load(job)
    imported = resident()
    side = build()
    send(channel, {"name": side.name, "imported": imported, "built": resident()})
    wall, cpu = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        waited = {"waited_s": time.perf_counter() - wall, "waited_cpu_s": time.process_time() - cpu}
        request = json.loads(line)
        answer = getattr(side, request.pop("do"))(**request)
        send(channel, answer | waited | {"peak": peak()})
        wall, cpu = time.perf_counter(), time.process_time()


def send(channel: TextIO, answer: Facts) -> None:
    """One line."""
    channel.write(json.dumps(answer) + "\n")
    channel.flush()


def main() -> None:
    """Serves one job; what it refuses goes to the parent as {"refused": message}."""
    channel = take_stdout()
    try:
        serve(json.loads(sys.argv[1]), channel)
    except (Refused, GaveUp) as error:
        send(channel, {"refused": str(error)})


if __name__ == "__main__":
    main()
