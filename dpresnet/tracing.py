"""``--trace FILE``: what all ranks do in some steps, on one clock.

`dpresnet.trace` collects what this process notes; here the device's own records join them, and the clocks of device and ranks
are compared. No clock is set and none is trusted: an exchange bounds how far two clocks may be apart, because nobody has
all values before everybody has given one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyopencl as cl

from dpresnet import __version__, trace
from dpresnet.comm import Comm
from dpresnet.config import Config
from dpresnet.device import Device
from dpresnet.errors import Refused
from dpresnet.plan import Launch
from dpresnet.replicas import Replicas
from dpresnet.trace import DEVICE, MOST_SPANS, Part, Span

ROUNDS = 16  # of comparing clocks; the narrowest bounds of all count

Bounds = tuple[float, float]


def check_path(path: Path) -> None:
    """Refuses a trace that could not be written, before the run has begun."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--trace {path} cannot be written ({error.strerror}): choose another file") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise Refused(f"--trace {path} cannot be written: choose another file")


def middle(bounds: list[Bounds]) -> tuple[float, float]:
    """The middle of what all the bounds have in common, and how far off it may be."""
    least, most = max(low for low, _ in bounds), min(high for _, high in bounds)
    return (least + most) / 2, abs(most - least) / 2


def ahead_of_rank_0(comm: Comm) -> tuple[float, float]:
    """Seconds by which this rank's clock is ahead of rank 0's, and how far off that may be; collective.

    Whoever leaves an all-gather does so after everybody has entered it: entered - left of rank 0 <= ahead <= left - entered
    of rank 0.
    """
    comm.events.what = "clocks"
    bounds = []
    for _ in range(ROUNDS):
        entered = trace.clock()
        theirs = comm.allgather(np.array(entered))
        left = trace.clock()
        bounds.append((entered - comm.allgather(np.array(left))[0], left - theirs[0]))
    return middle(bounds) if comm.rank else (0.0, 0.0)


def ahead_of_host(device: Device) -> float:
    """Seconds by which the clock of the device's records is ahead of the host's."""
    word = cl.Buffer(device.context, cl.mem_flags.READ_WRITE, 4)
    bounds = []
    for _ in range(ROUNDS):
        before = trace.clock()
        event = cl.enqueue_fill_buffer(device.queue, word, np.zeros(1, np.uint32), 0, 4)
        event.wait()
        bounds.append((1e-9 * event.profile.end - trace.clock(), 1e-9 * event.profile.queued - before))
    return middle(bounds)[0]


class Tracer:
    """Records the first steps of a run, as many as ``cfg.trace_steps`` says, writes them on rank 0 and ``say``s so."""

    def __init__(self, cfg: Config, comm: Comm, replicas: Replicas, say: Callable[[str], None]):
        self._cfg, self._comm, self._replicas, self._device, self._say = cfg, comm, replicas, replicas.device, say
        self._spans: list[Span] | None = None
        self._launched: deque[tuple[Launch, cl.Event]] = deque()  # whose records have not been read
        self._steps = 0

    def start(self) -> None:
        """Begins, if the run is to be traced; collective."""
        if not self._cfg.trace:
            return
        self._device.record_times(True)
        self._device_ahead = ahead_of_host(self._device)
        self._clock = ahead_of_rank_0(self._comm)
        self._replicas.observe = lambda launch, event: self._launched.append((launch, event))
        self._spans = trace.start()

    def step_done(self) -> None:
        """To be called after each step; collective after the last one that is recorded."""
        if self._spans is None:
            return
        self._steps += 1
        self._read_device()
        if self._steps == self._cfg.trace_steps:
            self.finish()

    def finish(self) -> None:
        """Ends the recording, if there is one, and writes it; collective."""
        if self._spans is None:
            return
        self._device.finish()
        self._read_device()
        trace.stop()
        self._device.record_times(False)
        self._replicas.observe = None
        ahead, doubt = self._clock
        self._comm.events.what = "the trace"
        parts = self._comm.gather(Part(self._comm.rank, self._comm.host, ahead, doubt, self._spans))
        self._spans = None
        if self._comm.rank == 0:
            self._write(parts)

    def _read_device(self) -> None:
        """Notes the launches that are done."""
        done, ahead = cl.command_execution_status.COMPLETE, self._device_ahead
        while self._launched and self._launched[0][1].command_execution_status == done:
            launch, event = self._launched.popleft()
            began, ended = 1e-9 * event.profile.start - ahead, 1e-9 * event.profile.end - ahead
            trace.note(DEVICE, launch.name, began, ended, kernel=f"{launch.stem}_{launch.verb}")

    def _write(self, parts: list[Part]) -> None:
        path, doubt = Path(self._cfg.trace), max(part.doubt for part in parts)
        try:
            trace.write(path, parts, version=__version__, device=self._device.name, mpi=self._comm.mpi_library)
        except OSError as error:
            self._say(f"WARNING: the trace cannot be written to {path} ({error.strerror})")
            return
        clocks = f", clocks compared to {1e3 * doubt:.2f} ms" if len(parts) > 1 else ""
        full = f", its first {MOST_SPANS:,} spans" if max(len(part.spans) for part in parts) == MOST_SPANS else ""
        self._say(f"a trace of {self._steps} steps{full}{clocks} is in {path}: open it in https://ui.perfetto.dev")
