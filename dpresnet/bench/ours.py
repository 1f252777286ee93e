"""dpresnet's side: the step that `dpresnet.train` takes with one replica per rank, and what the device did in it.

Import after `dpresnet.environment.prepare`: this loads OpenCL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pyopencl as cl

from dpresnet.amp import LossScaler
from dpresnet.augment import Augmentation
from dpresnet.bench.workload import Facts, Sgd, Workload
from dpresnet.comm import Comm, Solo
from dpresnet.config import statistics_group
from dpresnet.device import Device, choose_device
from dpresnet.initial import initial_state
from dpresnet.model import Model, Pixels
from dpresnet.optimizer import Hyper
from dpresnet.plan import Exchange, Launch
from dpresnet.replicas import share_gradients
from dpresnet.resnet import Options
from dpresnet.setup import in_turn
from dpresnet.trace import covered
from dpresnet.trainer import Trainer

BATCHES = 2  # fed in turn
WARM_STEPS = 3
SETTLING_STEPS = 30  # at most, until the loss scale no longer overflows

Span = tuple[float, float]  # begin and end on the device's clock, in seconds


class Ours:
    """One replica of a network on each rank of ``comm``, its optimizer, and 8-bit images that are fed, cropped and flipped in
    every step.

    All ranks do the same, at the same time. ``bn`` as in `dpresnet.config`, ``sums`` as in `Trainer`.
    """

    def __init__(self, work: Workload, comm: Comm | None = None, bn: str = "sync", **sums: Any):
        self.work, self.comm, sgd = work, comm or Solo(), Sgd()
        ranks, rank = self.comm.size, self.comm.rank
        self.device = Device(choose_device(work.device), vector=work.vector)
        edge = (0.5,) * 3
        shape = (3, work.image, work.image)
        augmentation = Augmentation(shape, shape[1:], enabled=not work.infer, flip=True)
        pixels = Pixels(np.array(edge), np.array(edge) / 2, augmentation)
        options = Options(work.classes, work.stem)
        scaler = LossScaler() if work.precision == "fp16" else LossScaler.disabled()
        self.model = Model(self.device, work.arch, options, shape, work.batch, work.precision, pixels=pixels)
        commons = share_gradients(self.model, self.comm, ranks)
        with in_turn(self.comm):
            self.trainer = Trainer(self.model, self.comm, ranks, group=statistics_group(bn, ranks), scaler=scaler,
                                   commons=commons, **sums)  # fmt: skip
        self.lr, self._hyper = sgd.lr, Hyper(sgd.momentum, sgd.weight_decay)
        random = np.random.default_rng(rank)
        self._batches = []
        for k in range(rank, ranks * BATCHES, ranks):
            images = random.integers(0, 256, (work.batch, *shape), np.uint8)
            labels = random.integers(0, work.classes, work.batch, np.int32)
            indices = np.arange(k * work.batch, (k + 1) * work.batch)
            self._batches.append((images, labels, augmentation.drawn(0, 0, indices, images)))
        self._done = 0

    @property
    def name(self) -> str:
        """Device, platform, driver and how wide its vectors are here."""
        return self.device.name_with_lanes

    def step(self) -> bool:
        """One whole step (or evaluation); returns whether the loss scaler dropped it."""
        batch = self._batches[self._done % BATCHES]
        self._done += 1
        if self.work.infer:
            self.trainer.evaluate([batch])
            return False
        return self.trainer.step([[batch]], self.work.batch * self.comm.size, self.lr, self._hyper).skipped

    def warm(self) -> Facts:
        """Compiles and settles; seconds of a step afterwards, the steps that the loss scaler dropped on the way, and which
        measured tile sizes the device has.
        """
        with in_turn(self.comm):
            self.trainer.replicas.warm()  # runs the update too, on whatever lies in the gradients
        self.trainer.restore(initial_state(self.model.state, 0))
        skipped = 0
        for _ in range(SETTLING_STEPS):
            dropped = self.step()
            skipped += dropped
            if not dropped:
                break
        seconds = self.run(WARM_STEPS)["seconds"]
        return {"step_s": min(seconds), "skipped": skipped, "tuned": self.device.tuned.facts}

    def run(self, steps: int) -> Facts:
        """Seconds of each step, how many of them the loss scaler dropped: those skip the update, and what a step of several
        ranks takes them in exchanges, as in metrics.jsonl.

        The update of a step may still run while the next one is fed, as in training; the last step's end is waited for.
        """
        self.comm.barrier()
        before, clock, skipped = self.comm.traffic, [time.perf_counter()], 0
        for number in range(1, steps + 1):
            skipped += self.step()
            if number == steps:
                self.device.finish()
            clock.append(time.perf_counter())
        found = {"seconds": [end - begin for begin, end in pairwise(clock)], "skipped": skipped}
        if self.comm.size > 1:
            found["traffic"] = {name: value / steps for name, value in (self.comm.traffic - before).metrics.items()}
        return found

    def overhead(self, steps: int) -> Facts:
        """Per step, in seconds: wall time, time in which a kernel ran on the device, time in gaps at exchanges of
        statistics, and CPU time of this thread.

        In an in-order queue no two kernels overlap, so what their spans leave of the wall time is that of launches, of
        Python and of exchanges with the host. On a CPU device this thread takes its own time from the kernels as well;
        that part is in no gap and is why it is listed.
        """
        rows = [self._profiled_step() for _ in range(steps)]
        return {key: [row[key] for row in rows] for key in ("wall_s", "kernels_s", "exchanges_s", "thread_s")} | {
            "launches": rows[0]["launches"]}  # fmt: skip

    def _profiled_step(self) -> Facts:
        with self.profiling() as events:
            wall, thread = time.perf_counter(), time.thread_time()
            self.step()
            self.device.finish()
            wall, thread = time.perf_counter() - wall, time.thread_time() - thread
        spans = [span(event) for _, event in events]
        ids = [id(launch) for launch, _ in events]
        exchanges = gaps_before(self._after_exchanges(), ids, spans)
        return {"wall_s": wall, "kernels_s": covered(spans), "exchanges_s": exchanges, "thread_s": thread,
                "launches": len(spans)}  # fmt: skip

    def _after_exchanges(self) -> set[int]:
        """Launches that wait for an exchange with the host."""
        waiting, found = False, set()
        if self.trainer.sync_bn.alone:
            return found
        for entry in self.model.evaluate.plan if self.work.infer else self.model.train.plan:
            if isinstance(entry, Launch) and waiting:
                found.add(id(entry))
            waiting = isinstance(entry, Exchange) or (waiting and not isinstance(entry, Launch))
        return found

    @contextmanager
    def profiling(self, between: Callable[[list], None] | None = None) -> Iterator[list[tuple[Launch, cl.Event]]]:
        """Within, commands go to a queue that records when they ran; gives every launch and its event, in order.

        ``between(launches so far)`` is called after each launch and may enqueue work of its own.
        """
        events: list[tuple[Launch, cl.Event]] = []

        def observe(launch: Launch, event: cl.Event) -> None:
            events.append((launch, event))
            if between:
                between(events)

        self.device.record_times(True)
        self.trainer.replicas.observe = observe
        try:
            yield events
        finally:
            self.device.record_times(False)
            self.trainer.replicas.observe = None

    def memory(self) -> Facts:
        """Bytes that the arenas hold, by home."""
        return {"parts": {home: sum(chunks) for home, chunks in self.model.bytes.items()}}


def span(event: cl.Event) -> Span:
    """When a finished command ran."""
    return 1e-9 * event.profile.start, 1e-9 * event.profile.end


def gaps_before(chosen: set[int], launches: list[int], spans: list[Span]) -> float:
    """Seconds between the end of a launch and the begin of the next, added up over the next ones that are chosen."""
    following = zip(launches[1:], pairwise(spans), strict=True)
    return sum(max(0.0, begin - end) for launch, ((_, end), (begin, _)) in following if launch in chosen)
