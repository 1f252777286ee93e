"""The replicas of one process: their memory, their bound kernels, and the loop that replays a plan.

A process with several replicas runs each entry for every one of them before the next entry. So one process emulates any
number of ranks, and a rank with one replica runs the same loop of length one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyopencl as cl

from dpresnet.model import PRIVATE, SHARED, Model, Recorded
from dpresnet.plan import Entry, Exchange, Launch, Memory, Plan, Ready, Tensor, bind
from dpresnet.shared import Commons, paged
from dpresnet.update import TRAINED

Handler = Callable[..., None]
Inspector = Callable[[int, Entry], None]


@dataclass(frozen=True, order=True)
class NonFinite:
    """An infinity or NaN that an entry wrote; ``index`` counts entries of the plan, ``replica`` counts all replicas."""

    micro_batch: int
    index: int
    replica: int
    name: str
    tensor: str

    def __str__(self) -> str:
        where = f" in micro-batch {self.micro_batch}" if self.micro_batch else ""
        return f"entry {self.index} ({self.name}) of replica {self.replica} wrote a non-finite value into {self.tensor}{where}"


@dataclass
class Replica:
    """One replica of this process; ``number`` counts over all processes.

    ``averaged`` are the kernels of an evaluation that finds the moving averages where the state would be.
    """

    number: int
    memory: Memory
    kernels: dict[Plan, list[cl.Kernel | None]]
    averaged: dict[Plan, list[cl.Kernel | None]]


def share_gradients(model: Model, comm: Any, replicas: int, reduce: str = "tree") -> Commons | None:
    """Gradient arenas that the ranks of a node have in common, where that helps: sums read them where they are.

    Collective over the ranks of ``comm``, which have ``replicas`` in all.
    """
    if not model.device.host_memory or reduce != "tree":
        return None
    local, nbytes = replicas // comm.size, paged(model.bytes["gradient"][0])
    shared = comm.share(local * nbytes)
    return Commons(shared, local, nbytes) if shared else None


class Replicas:
    """``count`` replicas of a model, the first of which is number ``first`` of all; their gradients lie in the ``commons`` if
    there are any.
    """

    def __init__(self, model: Model, first: int, count: int, commons: Commons | None = None):
        self.model, self.device = model, model.device
        self.observe: Callable[[Launch, cl.Event], None] | None = None  # told of every launch, for measurements
        shared = {home: self._arenas(home) for home in SHARED}
        self._constants: dict[int, cl.Buffer] = {}  # kept: setting a kernel's argument does not keep the buffer alive
        constants = self._constants
        self.all: list[Replica] = []
        for number in range(first, first + count):
            own = {home: self._arenas(home) for home in PRIVATE if home != "gradient" or not commons}
            if commons:
                own["gradient"] = [self.device.arena(*model.bytes["gradient"], commons.own[number - first])]
            memory = Memory(shared | own)
            plans = (model.train.plan, model.evaluate.plan, model.evaluate.prepare)
            kernels = {plan: bind(plan, memory, constants) for plan in plans}
            averaged = {}
            if model.rule.ema:
                there = {home: memory.homes[f"ema_{home}"] for home in ("parameter", "buffer")}
                averaged = {plan: bind(plan, Memory(memory.homes | there), constants) for plan in plans[1:]}
            self.all.append(Replica(number, memory, kernels, averaged))
        for replica in self.all:
            for plan in (*model.accumulate, *model.complete):
                replica.kernels[plan] = bind(plan, replica.memory, constants)
        leader = self.all[0]
        for plan in model.update.plans:
            leader.kernels[plan] = bind(plan, leader.memory, constants)
        self._prepared: tuple[Recorded, bool] | None = None  # whose preparation the work arenas hold, and whether of averages
        self.memory = leader.memory  # parameters, momentum and running statistics are the same for all

    def _arenas(self, home: str) -> list:
        return [self.device.arena(nbytes) for nbytes in self.model.bytes[home]]

    def enqueue(self, launch: Launch, kernel: cl.Kernel) -> cl.Event:
        """Starts one launch."""
        event = self.device.enqueue(kernel, launch.size)
        if self.observe:
            self.observe(launch, event)
        return event

    def run_shared(self, plan: Plan) -> None:
        """Replays a plan on what the replicas share."""
        for launch, kernel in zip(plan, self.all[0].kernels[plan], strict=True):
            self.enqueue(launch, kernel)

    def run_each(self, plan: Plan) -> cl.Event:
        """Replays a plan without exchanges on every replica; the event of the last launch."""
        event = None
        for replica in self.all:
            for launch, kernel in zip(plan, replica.kernels[plan], strict=True):
                event = self.enqueue(launch, kernel)
        return event

    def run(self, recorded: Recorded, exchange: Handler, ready: Handler, inspect: Inspector | None = None,
            averaged: bool = False) -> None:  # fmt: skip
        """Replays a plan on every replica, prepared where that is needed.

        ``exchange(entry, event)`` is called when replicas must agree, with the event of the last launch that writes what they
        exchange, and ``ready(bucket, event)`` when all launches of a bucket are enqueued. ``inspect(index, entry)`` follows
        each entry; what it reads of the entry's tensors is finished. ``averaged`` evaluates the moving averages.
        """
        if self._prepared != (recorded, averaged):
            self._prepare(recorded, averaged)
        plan, event = recorded.plan, None
        kernels = [(replica.averaged if averaged else replica.kernels)[plan] for replica in self.all]
        written: dict[Tensor, cl.Event] = {}
        for index, entry in enumerate(plan):
            match entry:
                case Launch():
                    for bound in kernels:
                        event = self.enqueue(entry, bound[index])
                    for tensor in entry.statistics:
                        written[tensor] = event
                case Exchange():
                    last = next(tensor for tensor in reversed(written) if tensor in entry.sources)
                    exchange(entry, written[last])
                case Ready():
                    ready(entry.bucket, event)
            if inspect:
                inspect(index, entry)

    def _prepare(self, recorded: Recorded, averaged: bool) -> None:
        for replica in self.all:
            kernels = replica.averaged if averaged else replica.kernels
            for launch, kernel in zip(recorded.prepare, kernels.get(recorded.prepare, ()), strict=True):
                self.enqueue(launch, kernel)
        self._prepared = (recorded, averaged)

    def find_non_finite(self, index: int, entry: Entry) -> NonFinite | None:
        """The first replica and tensor into which this entry wrote a non-finite value."""
        for replica in self.all:
            for tensor in entry.writes:
                values = replica.memory.read(tensor)
                if values.dtype.kind == "f" and not np.isfinite(values).all():
                    return NonFinite(0, index, replica.number, entry.name, tensor.name)
        return None

    def warm(self) -> None:
        """Runs every kernel once on cleared memory, so that the driver compiles what it compiles at the first launch."""
        replica, harmless = self.all[0], np.zeros(1, self.model.update.hyper.dtype)
        harmless["eps"] = 1  # AdamW divides by it, and a NaN between the parameters would stay
        self.memory.write(self.model.update.hyper, harmless)
        for plan, kernels in replica.kernels.items():
            seen = set()
            for entry, kernel in zip(plan, kernels, strict=True):
                if isinstance(entry, Launch):
                    key = (entry.stem, entry.verb, entry.defines)
                    if key not in seen:
                        seen.add(key)
                        self.enqueue(entry, kernel)
        self.device.finish()

    def feed(self, recorded: Recorded, batches: list[tuple], control: dict[str, float]) -> None:
        """Hands each replica its (images, labels, ..., views); short batches leave old images in place, marked invalid."""
        for replica, (images, labels, *_, views) in zip(self.all, batches, strict=True):
            memory, count = replica.memory, len(images)
            values = np.zeros(1, recorded.control.dtype)
            for name, value in {**control, "valid": count}.items():
                values[name] = value
            memory.write(recorded.control, values)
            for tensor, array in ((recorded.images, images), (recorded.labels, labels), (recorded.views, views)):
                if tensor is not None and count:
                    memory.view(tensor)[:count] = array
                    memory.push(tensor)

    # State by name: numpy views on the host side of the shared arenas.

    def parameter(self, name: str, part: str = "value") -> np.ndarray:
        """A parameter (or another field of it) in its logical shape; call `device.finish` before reading."""
        parameter = self.model.state.parameters[name]
        return self.memory.view(getattr(parameter, part)).ravel()[: parameter.size].reshape(parameter.shape)

    def buffer(self, name: str, part: str = "value") -> np.ndarray:
        """A running statistic (or its "ema") [channels]."""
        buffer = self.model.state.buffers[name]
        return self.memory.view(getattr(buffer, part))[: buffer.channels]

    def trained(self) -> dict[str, np.ndarray]:
        """All that a run has learnt, keyed as in a checkpoint (param/, momentum/, buffer/ and so on)."""
        rule, state = self.model.rule, self.model.state
        found = {f"{group}/{name}": self.parameter(name, part)
                 for group, part in rule.of_parameters.items() for name in state.parameters}  # fmt: skip
        return found | {f"{group}/{name}": self.buffer(name, part)
                        for group, part in rule.of_buffers.items() for name in state.buffers}  # fmt: skip

    def pull_state(self) -> None:
        """Makes the host side of the state current."""
        for home in TRAINED:
            for arena in self.memory.homes[home]:
                arena.pull(0, arena.nbytes)

    def push_state(self) -> None:
        """Makes the device side of the state current."""
        for home in TRAINED:
            for arena in self.memory.homes[home]:
                arena.push(0, arena.nbytes)
        self._prepared = None
