"""A training run: what is set up once, the loop over epochs, saving and going on.

What each step computes is in `dpresnet.course`; here is what a run leaves behind.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dpresnet import __version__, checkpoint, trace, trail
from dpresnet.classifier import Samples
from dpresnet.comm import Comm
from dpresnet.config import Config, check_resume, digest, from_json, to_json
from dpresnet.course import Course
from dpresnet.data import Batch, load
from dpresnet.device import Device, candidates
from dpresnet.errors import GaveUp, Refused, Stopped
from dpresnet.evaluation import MOST_CLASSES, Tests, confusion_text, figures, per_class
from dpresnet.failure import StopFlag
from dpresnet.replicas import share_gradients
from dpresnet.reporter import Reporter, check_tensorboard
from dpresnet.setup import (
    build_model,
    build_trainer,
    check_dataset,
    check_memory,
    claim,
    find_checkpoint,
    from_rank_0,
    handshake,
    in_turn,
    odd_ranks,
    put_aside,
    resolve,
    straggler,
)
from dpresnet.stall import Stall
from dpresnet.tracing import Tracer, check_path
from dpresnet.trail import Trail
from dpresnet.trainer import Outcome

STRAGGLES = 1.5  # times the median, and a rank is worth a warning
LONGEST_STEPS = 10  # that a rank waits for the others, at least: of the RECENT ones
RECENT = 100
SLOW_S = 900.0  # that it waits at least while others set up (compile, read data) or rank 0 writes a checkpoint
SAVES_THAT_MAY_FAIL = 3  # in a row, before a full disk ends the run


class Session:
    """One run on this rank."""

    def __init__(self, cfg: Config, comm: Comm):
        self.comm = comm
        self.started_at = time.monotonic()
        self._wait_at_most(cfg.timeout, SLOW_S)
        self.folder, self.trails, self.events = (Path(cfg.out) / name for name in ("checkpoints", "trail", "events"))
        saved, rejected = from_rank_0(comm, lambda: find_checkpoint(cfg))
        self.dataset = load(cfg.dataset, cfg.seed, cfg.image, cfg.channels, cfg.num_classes, cfg.data_mb * 2**20)
        self.cfg = cfg = resolve(cfg, self.dataset, comm.size, from_json(saved.meta["config"]) if saved else None)
        if saved:
            check_resume(saved.meta["config"], cfg)
        check_dataset(saved, self.dataset, cfg.dataset)
        devices = candidates(cfg.device)
        self.device = Device(devices[comm.local_rank % len(devices)])
        notes = [f"passed over {bad}" for bad in rejected]
        if not cfg.dry_run:
            notes += from_rank_0(comm, lambda: self._claim_folder(cfg, saved))
            comm.keep_events(self.events)
        ranks_on_device = -(-comm.local_size // len(devices))
        model = build_model(self.device, cfg, self.dataset)
        check_memory(model, cfg.replicas // comm.size, ranks_on_device)
        comm.events.what = "memory in common"
        commons = share_gradients(model, comm, cfg.replicas, cfg.reduce)
        with in_turn(comm):
            self.trainer = build_trainer(cfg, model, comm, commons)
            if comm.local_rank == 0:
                self.trainer.replicas.warm()
        comm.events.what = "what the ranks are to have in common"
        handshake(comm, self._facts())
        self.longest: deque[float] = deque([0.0], RECENT)  # seconds of the last steps
        self._wait_at_most(cfg.timeout)
        self.course = Course(cfg, self.dataset, self.trainer)
        self.course.begin(saved)
        self.progress = self.course.progress
        self.reporter = Reporter(Path(cfg.out), cfg, ranks=comm.size, enabled=comm.rank == 0)
        self.tracer = Tracer(cfg, comm, self.trainer.replicas, self.reporter.note)
        self.failed_saves, self.saved_step = 0, self.progress.step if saved else -1
        self.train_s, self.trained, self.stall = 0.0, 0, Stall()
        self.busy_s, self.slowest = 0.0, {}  # since the ranks were compared last; what that has shown
        for note in notes:
            self.reporter.note(note)

    # Setting up

    def _wait_at_most(self, timeout: float, at_least: float = 0.0) -> None:
        """How long this rank waits for others: as --timeout says, or longer for what may take long; 0: for ever."""
        self.comm.timeout = max(timeout, at_least) if timeout else 0.0

    def _claim_folder(self, cfg: Config, saved: checkpoint.Checkpoint | None) -> list[str]:
        """On rank 0: nobody else writes to the run folder, it can be written, and a fresh run finds no old checkpoints."""
        checkpoint.check_writable(self.folder)
        if cfg.trace:
            check_path(Path(cfg.trace))
        if cfg.tensorboard:
            check_tensorboard()
        self._lock = claim(self.folder.parent)
        for ring in self.events.glob("*.ring"):
            ring.unlink()
        trail.forget(self.trails, after=saved.meta["progress"]["step"] if saved else -1)
        note = "" if cfg.resume else put_aside(self.folder)
        return [note] if note else []

    def _facts(self) -> dict[str, object]:
        shapes = {p.name: p.shape for p in self.trainer.model.parameters}
        return {
            "version": __version__,
            "mathematics": digest(self.cfg),
            "flags": {k: v for k, v in to_json(self.cfg).items() if k not in ("device", "threads")},
            "parameter shapes": shapes,
            "buckets": [(bucket.start, bucket.stop) for bucket in self.trainer.buckets],
            "data set": self.dataset.fingerprint,
            "kind of device": (self.device.cl.platform.name, self.device.vector),  # others round differently
        }

    # The loop

    def run(self, stop: StopFlag) -> None:
        """Trains to the end; raises Stopped after saving when any rank was asked to stop."""
        self.comm.events.what = "requests to stop"
        if self.comm.agree([stop.requested])[0]:
            raise Stopped("stopped on request before the first step: nothing was lost")
        with self.reporter:
            self.reporter.started(self.course.last, self.progress.step, self.progress.samples)
            self.tracer.start()
            tests = None
            while self.progress.step < self.course.last:
                tests = self._epoch(stop)
            tests = tests or self._evaluate()
            if self.saved_step != self.progress.step:
                self._save(required=True)
            self.tracer.finish()
            self._finish(tests)

    def _epoch(self, stop: StopFlag) -> Tests | None:
        """The rest of the current epoch; returns its evaluations if it was completed."""
        tests, began = None, time.monotonic()
        for epoch, micro_batches in self.course.rest_of_epoch():
            with trace.span(f"step {self.progress.step + 1}"):
                outcome = self._step(epoch, micro_batches, stop, began)
            record = False
            if self.course.at_end_of_epoch:
                tests = self._evaluate()
                record = self._close_epoch(epoch, tests)
            self._save_if_due(epoch, record, outcome.stop)
            self.tracer.step_done()
            if self.progress.step == self.course.last:
                break
            began = time.monotonic()
        return tests

    def _close_epoch(self, epoch: int, tests: Tests) -> bool:
        """Reports an epoch; returns whether the test accuracy, of the moving average if there is one, is the best so far."""
        progress, accuracy = self.progress, tests["ema_" if "ema_" in tests else ""].accuracy
        self.reporter.epoch(epoch, *progress.close_epoch(), **figures(tests))
        if not np.isfinite(tests[""].loss):
            self.reporter.note("WARNING: the loss on the test split is not finite: the run has diverged")
        record = accuracy > progress.best_accuracy
        progress.best_accuracy = max(progress.best_accuracy, accuracy)
        return record

    def _save_if_due(self, epoch: int, record: bool, stop: bool) -> None:
        """Saves what the flags ask for, the best epochs, and before stopping. Comes last in a step: the state is whole."""
        cfg, step = self.cfg, self.progress.step
        by_epoch = self.course.at_end_of_epoch and cfg.save_every_epochs and (epoch + 1) % cfg.save_every_epochs == 0
        by_step = cfg.save_every_steps and step % cfg.save_every_steps == 0
        if by_epoch or by_step or record or stop:
            self._save(record, required=stop)
        if stop:
            self.tracer.finish()
            raise Stopped(f"stopped on request after step {step}; --resume auto goes on from there")

    def _step(self, epoch: int, micro_batches: list[Batch], stop: StopFlag, began: float) -> Outcome:
        """One training step and its line in the report; its time counts from ``began``, when its images were asked for."""
        cfg, progress, waited_s = self.cfg, self.progress, time.monotonic() - began
        lr, scale = self.course.lr, self.trainer.scaler.scale
        recorded = Trail() if cfg.record_every and (progress.step + 1) % cfg.record_every == 0 else None
        self.comm.events.step, before = progress.step + 1, self.comm.traffic
        outcome = self.course.step(micro_batches, stop.requested, recorded)
        if recorded:
            self._leave_trail(recorded)
        seconds = time.monotonic() - began
        self.train_s += seconds
        traffic = self.comm.traffic - before
        self.busy_s += seconds - traffic.waited_s
        self.longest.append(seconds)
        self._wait_at_most(cfg.timeout, LONGEST_STEPS * max(self.longest))
        self.trained += outcome.count
        norm = {"grad_norm": outcome.grad_norm} if cfg.clip_norm else {}
        self.reporter.step(progress.step, epoch, progress.samples, outcome.loss / outcome.count, lr, scale,
                           self.trainer.scaler.skipped, outcome.correct / outcome.count, outcome.count / seconds,
                           input_ms=1e3 * waited_s, **norm, **self.slowest,
                           **(traffic.metrics if self.comm.size > 1 else {}))  # fmt: skip
        self.slowest = {}
        if stalled := self.stall.add(waited_s, seconds):
            self.reporter.note(stalled)
        if outcome.culprit:
            self.reporter.note(f"step {progress.step} skipped: {outcome.culprit}")
        if cfg.check_every and progress.step % cfg.check_every == 0:
            self._compare_ranks()
        return outcome

    def _leave_trail(self, recorded: Trail) -> None:
        """Writes the trail of the last step; a disk that is full does not end the run."""
        try:
            trail.write(self.trails, self.progress.step, self.comm.rank, self.comm.host, recorded)
        except OSError as error:
            step = self.progress.step
            self.reporter.note(f"WARNING: the trail of step {step} cannot be written to {self.trails} ({error.strerror})")

    def _evaluate(self) -> Tests:
        """The test split, each sample exactly once over all replicas."""
        with trace.span("evaluation"):
            tests = self.course.evaluate()
        for test in tests.values():
            if test.culprit:
                self.reporter.note(f"evaluation: {test.culprit}")
        return tests

    # Leaving something behind

    def _compare_ranks(self) -> None:
        """Raises GaveUp on all ranks unless they hold the same bits: what went wrong on one of them is not saved."""
        if self.comm.size == 1:
            return
        self.comm.events.what = "digests of the parameters"
        found = self.comm.gather((self.trainer.fingerprint(), self.comm.host, self.busy_s))
        self._report_straggler([busy_s for *_, busy_s in found], [host for _, host, _ in found])
        if odd := odd_ranks([(fingerprint, host) for fingerprint, host, _ in found]):
            saved = f"step {self.saved_step}" if self.saved_step >= 0 else "none"
            raise GaveUp(f"after step {self.progress.step} {odd}: memory or arithmetic of a machine has failed; go on with "
                         f"--resume auto on other machines (last checkpoint: {saved})")  # fmt: skip

    def _report_straggler(self, busy_s: list[float], hosts: list[str]) -> None:
        """All wait for the slowest rank: the next line of the metrics says which it was, and a warning if by far."""
        self.busy_s = 0.0
        if min(busy_s) > 0:
            rank, ratio = straggler(busy_s)
            self.slowest = {"slowest_rank": rank, "slowest_ratio": ratio}
            if ratio > STRAGGLES:
                self.reporter.note(f"WARNING: rank {rank} on {hosts[rank]} takes {ratio:.1f} times as long as the median rank, "
                                   "and all wait for it: look at its load, clock and disk")  # fmt: skip

    def _save(self, best: bool = False, required: bool = False) -> None:
        """Writes a checkpoint on rank 0. A disk that is full now may not be later, so some failures are only reported."""
        self._compare_ranks()
        self.comm.events.what = "the checkpoint of rank 0"
        self._wait_at_most(self.cfg.timeout, SLOW_S)
        failed = from_rank_0(self.comm, lambda: self._write_checkpoint(best))
        self._wait_at_most(self.cfg.timeout, LONGEST_STEPS * max(self.longest))
        self.failed_saves = self.failed_saves + 1 if failed else 0
        if not failed:
            self.saved_step = self.progress.step
        elif required or self.failed_saves >= SAVES_THAT_MAY_FAIL:
            raise Refused(failed)
        else:
            self.reporter.note(f"WARNING: {failed}; training goes on")

    def _write_checkpoint(self, best: bool) -> str:
        """Returns why it could not be written, "" if it was; raises GaveUp for a state that must not be kept."""
        meta = {
            "progress": asdict(self.progress),
            "scaler": self.trainer.scaler.to_dict(),
            "config": to_json(self.cfg),
            "fingerprint": self.dataset.fingerprint,
            "data": Samples.of(self.dataset).to_json(),
            "ranks": self.comm.size,
            "versions": self._versions(),
        }
        try:
            with trace.span("checkpoint"):
                checkpoint.save(self.folder, self.progress.step, self.trainer.arrays(), meta, self.cfg.keep, best)
        except checkpoint.SaveFailed as error:
            return str(error)
        except ValueError as error:
            raise GaveUp(f"{error}: the run has diverged; resume from the last checkpoint with a lower --lr") from None
        return ""

    def _versions(self) -> dict[str, str]:
        return {
            "dpresnet": __version__,
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "device": self.device.name,
            "mpi": self.comm.mpi_library,
        }

    def _finish(self, tests: Tests) -> None:
        self.comm.events.what = "the result"
        peaks = self.comm.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        cfg = self.cfg
        result = {
            "arch": cfg.arch,
            "dataset": self.dataset.name,
            "replicas": cfg.replicas,
            "ranks": self.comm.size,
            "precision": cfg.precision,
            "steps": self.progress.step,
            "epochs": self.progress.step / self.course.steps_per_epoch,
            **figures(tests),
            **per_class(tests),
            "images_per_s": self.trained / self.train_s if self.train_s else None,
            "wall_s": time.monotonic() - self.started_at,
            "peak_rss_mb": max(peaks),
            "device": self.device.name,
            "params_sha256": self.trainer.digest(),
            "versions": self._versions(),
        }
        few = cfg.num_classes <= MOST_CLASSES
        self.reporter.finished(result, confusion_text(tests, self.dataset.class_names) if few else "")
