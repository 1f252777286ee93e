"""One training step over all replicas: replay, exchange, reduce, agree, update.

A `Trainer` joins the OpenCL side (`Replicas`) and the ranks (`Comm`). With a `Solo` communicator it trains any number of
replicas in one process, by the same code.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyopencl as cl

from dpresnet import trace
from dpresnet.amp import LossScaler
from dpresnet.buckets import allreduce, plan_buckets
from dpresnet.comm import Comm
from dpresnet.errors import GaveUp
from dpresnet.exchange import TreeExchange, add
from dpresnet.model import Model, Recorded
from dpresnet.optimizer import Hyper, Optimizer
from dpresnet.plan import Entry, Exchange, Tensor, aligned
from dpresnet.replicas import Handler, Inspector, NonFinite, Replicas
from dpresnet.shared import Commons
from dpresnet.syncbn import SyncBN
from dpresnet.trail import WHOLE_RANK, Trail

NAP_S = 5e-5  # between looks at the device while buckets are under way


@dataclass(frozen=True)
class Outcome:
    """Sums over a global batch: images, loss (not scaled), correct answers, and what the ranks agreed on.

    ``culprit`` names the first non-finite value of a batch that was checked and found to have one; ``grad_norm`` is that of a
    step which may limit it, None if it was skipped.
    """

    count: int
    loss: float
    correct: int
    skipped: bool = False
    stop: bool = False
    culprit: str = ""
    grad_norm: float | None = None


class Trainer:
    """``replicas`` replicas of a model over the ranks of ``comm``; each rank owns an equal, contiguous range.

    ``group`` neighbouring replicas (a divisor; 0: all of them) normalise with common statistics. ``reduce`` and ``wire`` as in
    `dpresnet.buckets.allreduce`. Without ``overlap`` no bucket is on its way before backward is over. ``commons`` are
    what `dpresnet.replicas.share_gradients` gave.
    """

    def __init__(self, model: Model, comm: Comm, replicas: int, *, group: int = 0, scaler: LossScaler | None = None,
                 first_bucket_mb: float = 1.0, bucket_mb: float = 25.0, reduce: str = "tree", wire: str = "fp32",
                 overlap: bool = True, check: bool = False, commons: Commons | None = None):  # fmt: skip
        self.model, self.comm, self.overlap, self.check = model, comm, overlap, check
        self.scaler = scaler or (LossScaler() if model.precision == "fp16" else LossScaler.disabled())
        self._exchange = TreeExchange(comm, replicas)
        sizes = [aligned(gradient.nbytes) for gradient in model.gradients]
        ranges = plan_buckets(sizes, first_bucket_mb, bucket_mb)
        model.set_buckets(ranges)
        self.buckets = [model.gradient_slice(bucket) for bucket in ranges]
        self._reduce = allreduce(comm, replicas, self.buckets, reduce, wire, commons)
        self.replicas = Replicas(model, self._exchange.own.start, len(self._exchange.own), commons)
        self.sync_bn = SyncBN(self.replicas, comm, replicas, group or replicas)
        self.optimizer = Optimizer(self.replicas)
        self._held: list[tuple[int, cl.Event]] = []  # buckets that wait for the end of backward
        self._ready: list[tuple[int, cl.Event]] = []  # buckets whose kernels may still run
        self._first_bad: NonFinite | None = None
        self._added = False  # the gradient arena lacks earlier micro-batches
        self.trail: Trail | None = None  # set for a step that is to be recorded

    @property
    def replicas_range(self) -> range:
        """The replicas of this rank, by their number among all."""
        return self._exchange.own

    # A step

    def step(self, micro_batches: Sequence[Sequence[tuple]], count: int, lr: float, hyper: Hyper, *,
             updates: int = 0, stop: bool = False) -> Outcome:  # fmt: skip
        """Trains on one global batch of ``count`` images, in one micro-batch or several whose gradients are added, after
        ``updates`` steps that were not skipped.

        A micro-batch is the (images, labels, ..., views) of each of this rank's replicas; views, `dpresnet.augment.VIEW`, are
        for 8-bit images. ``stop`` is this rank's wish to end; the outcome says whether any rank has it. A step with non-finite
        gradients changes nothing but the loss scaler. Raises GaveUp at its floor.
        """
        self.forward_backward(micro_batches, count)
        loss, correct, wishes = self._sums(int(stop))
        skipped = not np.isfinite(loss) or self.optimizer.overflowed()
        culprit = self._culprit() if skipped and self.check else ""
        try:
            scaler = self.scaler.after(skipped)
        except GaveUp as error:
            raise GaveUp(f"{error}; first: {culprit or self.explain(micro_batches, count)}") from None
        norm = None if skipped else self.optimizer.norm(self.scaler.scale)
        if not skipped:
            with trace.span("update"):
                self._update(lr, hyper, updates)
        self.scaler = scaler
        return Outcome(count, loss, correct, skipped, wishes > 0, culprit, norm)

    def forward_backward(self, micro_batches: Sequence[Sequence[tuple]], count: int) -> None:
        """Leaves the sum of the scaled gradients in the gradient arena of this rank's first replica."""
        self._begin()
        *earlier, last = micro_batches
        for number, batches in enumerate(earlier):
            self._replay(number, batches, count, lambda bucket, event: None)
            self.replicas.run_each(self.model.accumulate[min(number, 1)])
            self._count(self.model.train, batches)
            self.sync_bn.close()
        self._added = len(earlier) > 0
        self._replay(len(earlier), last, count, self._mark_ready)
        if self._held:
            self._held[-1][1].wait()
            self._ready, self._held = self._held, []
        while self._ready:
            self._wait_for(self._ready[0][1])
            self._progress()
        with trace.span("wait for gradients"):
            self._reduce.wait()
        arena = self.replicas.memory.homes["gradient"][0]
        arena.push(0, arena.nbytes)
        self._count(self.model.train, last)
        self._record("reduced", self.model.gradients)

    def _begin(self) -> None:
        """Forgets what the passes before have found."""
        self._tally = np.zeros((len(self.replicas.all), 2))
        self._first_bad = None
        self.sync_bn.forget()

    def _replay(self, number: int, batches: Sequence[tuple], count: int, ready: Handler, check: bool = False) -> None:
        """Runs the training plan on micro-batch ``number``."""
        with trace.span("forward and backward", micro_batch=number):
            self._feed(self.model.train, batches, count)
            exchange = self._go_on if self.sync_bn.alone else self._agree
            self.replicas.run(self.model.train, exchange, ready, self._inspector(number, check))

    def _inspector(self, number: int, check: bool) -> Inspector | None:
        """What looks at each entry of micro-batch ``number``, if anything does."""
        if not (check or self.check or self.trail):
            return None

        def inspect(index: int, entry: Entry) -> None:
            if (check or self.check) and not self._first_bad and (bad := self.replicas.find_non_finite(index, entry)):
                self._first_bad = replace(bad, micro_batch=number)
            for replica in self.replicas.all if self.trail else ():
                for tensor in entry.writes:
                    self.trail.add(number, replica.number, entry.name, tensor.name, replica.memory.read(tensor))

        return inspect

    def _record(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Adds to the trail what the replicas of this rank have in common, after the last micro-batch."""
        for tensor in tensors if self.trail else ():
            self.trail.add(0, WHOLE_RANK, name, tensor.name, self.replicas.memory.read(tensor))

    def evaluate(self, batches: Sequence[tuple], averaged: bool = False) -> Outcome:
        """Loss and correct answers of one global batch with running statistics, or with the moving averages of all."""
        self._begin()
        self._feed(self.model.evaluate, batches, 1)
        self.replicas.run(self.model.evaluate, self._agree, self._mark_ready, self._inspector(0, False), averaged)
        self._count(self.model.evaluate, batches)
        loss, correct, _ = self._sums()
        culprit = self._culprit() if self._first_bad else ""
        return Outcome(sum(len(images) for images, *_ in batches), loss, correct, culprit=culprit)

    def logits(self, batches: Sequence[tuple]) -> list[np.ndarray]:
        """float32 [images, classes] of each replica of this rank, of the batch that was evaluated last (views)."""
        found, classes = self.model.evaluate.logits, self.model.options.num_classes
        rows = zip(self.replicas.all, batches, strict=True)
        return [replica.memory.read(found)[: len(images), :classes] for replica, (images, *_) in rows]

    def _feed(self, recorded: Recorded, batches: Sequence[tuple], count: int) -> None:
        self.sync_bn.begin([len(images) for images, *_ in batches])
        self.replicas.feed(recorded, list(batches), {"grad_scale": self.scaler.scale / count})

    def _update(self, lr: float, hyper: Hyper, updates: int) -> None:
        self.optimizer.step(lr, hyper, self.scaler.scale, updates)
        self.sync_bn.commit()
        self.optimizer.average()
        rule, state = self.model.rule, self.model.state
        self._record("updated", [getattr(p, part) for p in self.model.parameters for part in rule.of_parameters.values()])
        self._record("updated", [getattr(b, part) for b in state.buffers.values() for part in rule.of_buffers.values()])

    def _count(self, recorded: Recorded, batches: Sequence[tuple]) -> None:
        """Adds the loss and the correct answers of each replica; waits for the device."""
        for row, replica, (images, *_) in zip(self._tally, self.replicas.all, batches, strict=True):
            for column, tensor in enumerate((recorded.loss, recorded.correct)):
                row[column] += replica.memory.read(tensor)[: len(images)].sum(dtype=np.float64)

    def _sums(self, stop: int = 0) -> tuple[float, int, int]:
        """Loss, correct answers and wishes to stop, summed over all replicas."""
        self.comm.events.what = "losses"
        loss, correct, wishes = self._exchange.combine(np.array([[*row, stop] for row in self._tally]), add)
        return float(loss), int(correct), int(wishes)

    # Buckets

    def _mark_ready(self, bucket: int, event: cl.Event) -> None:
        if self._added:
            event = self.replicas.run_each(self.model.complete[bucket])
        self.replicas.device.queue.flush()
        (self._ready if self.overlap else self._held).append((bucket, event))
        self._progress()

    def _progress(self) -> None:
        """Starts the reduction of buckets whose kernels are done, and lets MPI work on those under way."""
        while self._ready and self._ready[0][1].command_execution_status == cl.command_execution_status.COMPLETE:
            self._start_bucket(self._ready.pop(0)[0])
        self._reduce.progress()

    def _start_bucket(self, bucket: int) -> None:
        part = self.buckets[bucket]
        offset, nbytes = 4 * part.start, 4 * (part.stop - part.start)
        arenas = [replica.memory.homes["gradient"][0] for replica in self.replicas.all]
        if not self.replicas.device.host_memory:
            for arena in arenas:
                arena.pull(offset, nbytes)
        leaves = [arena.view(offset, (part.stop - part.start,), np.float32) for arena in arenas]
        self._reduce.start(bucket, leaves, leaves[0])

    # Exchanges

    def _go_on(self, entry: Exchange, event: cl.Event) -> None:
        """Instead of `_agree`: the device has what it needs, and running statistics are read when they are committed."""
        self.replicas.device.queue.flush()

    def _agree(self, entry: Exchange, event: cl.Event) -> None:
        """Waits for the entry's values and combines them over the replicas."""
        self._wait_for(event)
        self.sync_bn.agree(entry)

    def _wait_for(self, event: cl.Event) -> None:
        """Returns when the event is complete; meanwhile buckets under way go on."""
        self.replicas.device.queue.flush()
        with trace.span("wait for device"):
            while self._reducing and event.command_execution_status != cl.command_execution_status.COMPLETE:
                if self._reduce.running:
                    time.sleep(NAP_S)
                else:  # nothing to do before the next bucket is ready, which is before the event
                    self._ready[0][1].wait()
                self._progress()
            event.wait()

    @property
    def _reducing(self) -> bool:
        """Whether buckets are under way or about to be, on the way to other ranks."""
        return self.comm.size > 1 and bool(self._ready or self._reduce.running)

    # State

    def explain(self, micro_batches: Sequence[Sequence[tuple]], count: int) -> str:
        """Replays the batch entry by entry and names the first non-finite value over all ranks."""
        self._begin()
        for number, batches in enumerate(micro_batches):
            self._replay(number, batches, count, lambda bucket, event: None, check=True)
        return self._culprit()

    def _culprit(self) -> str:
        """The first non-finite value of the last checked replay, over all ranks."""
        found = [bad for bad in self.comm.gather(self._first_bad) if bad]
        return str(min(found)) if found else "no single entry is non-finite, only the sum over the replicas is"

    def digest(self) -> str:
        """SHA-256 over the fp32 parameters and running statistics in the order of their names."""
        return self._hashed(hashlib.sha256(), ("param", "buffer")).hexdigest()

    def fingerprint(self) -> bytes:
        """64 bits over the same values and their moving averages, in less time."""
        return self._hashed(hashlib.blake2b(digest_size=8), ("param", "buffer", "ema_param", "ema_buffer")).digest()

    def _hashed(self, total: Any, groups: Collection[str]) -> Any:
        self.replicas.pull_state()
        views = {name.partition("/")[::-2]: view for name, view in self.replicas.trained().items()}
        for name, group in sorted(views):
            if group in groups:
                total.update(np.ascontiguousarray(views[name, group]))
        return total

    def arrays(self) -> dict[str, np.ndarray]:
        """The trained state as a checkpoint stores it: param/, momentum/, buffer/ and what else the optimizer keeps, by name
        (copies).
        """
        self.replicas.pull_state()
        return {name: view.copy() for name, view in self.replicas.trained().items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `arrays`; names and shapes must be those of the model."""
        self.replicas.device.finish()
        views = self.replicas.trained()
        for name, value in arrays.items():
            views[name][...] = value
        self.replicas.push_state()
