"""A training run: what is set up once, the loop over epochs, saving and going on.

Everything of a run that is not a constant is in `Session.state`: the trained arrays, the loss scaler, the position, the best
accuracy, and the running sums of the epoch. A checkpoint holds exactly that, so a resumed run continues bit for bit.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from dpresnet import __version__, checkpoint
from dpresnet.amp import LossScaler
from dpresnet.comm import Comm
from dpresnet.config import Config, check_resume, digest, from_json, to_json, validate
from dpresnet.data import Dataset, Loader, load, order, steps_per_epoch
from dpresnet.device import Device, choose_device
from dpresnet.errors import Refused, Stopped
from dpresnet.failure import StopFlag
from dpresnet.initial import initial_state
from dpresnet.model import Model, Pixels
from dpresnet.report import Reporter
from dpresnet.resnet import Options, resolve_shortcut
from dpresnet.schedule import last_step, lr_at, planned_steps
from dpresnet.trainer import Hyper, Outcome, Trainer

T = TypeVar("T")

SAVES_THAT_MAY_FAIL = 3  # in a row, before a full disk ends the run


@dataclass
class Progress:
    """Where a run stands; together with the trained arrays and the loss scaler, its whole state."""

    step: int = 0
    samples: int = 0
    best_accuracy: float = -1.0
    epoch_loss: float = 0.0  # sums over the epoch so far
    epoch_correct: int = 0
    epoch_count: int = 0

    def count(self, outcome: Outcome) -> None:
        """Adds one step."""
        self.step += 1
        self.samples += outcome.count
        if not outcome.skipped:
            self.epoch_loss += outcome.loss
            self.epoch_correct += outcome.correct
            self.epoch_count += outcome.count

    def next_epoch(self) -> None:
        """Clears the sums of the epoch."""
        self.epoch_loss, self.epoch_correct, self.epoch_count = 0.0, 0, 0


def resolve(cfg: Config, dataset: Dataset, ranks: int, saved: Config | None) -> Config:
    """Fills in what depends on the data set, the ranks and, when resuming, the saved run."""
    if saved and cfg.replicas == 0:
        cfg = replace(cfg, replicas=saved.replicas)
    cfg = replace(
        cfg,
        replicas=cfg.replicas or ranks,
        num_classes=cfg.num_classes or dataset.classes,
        shortcut=resolve_shortcut(cfg.arch, cfg.shortcut),
    )
    if cfg.replicas % ranks:
        divisors = [str(n) for n in range(1, cfg.replicas + 1) if cfg.replicas % n == 0]
        raise Refused(f"--replicas {cfg.replicas} cannot be divided among {ranks} ranks: use {', '.join(divisors)} ranks")
    if cfg.num_classes < dataset.classes:
        raise Refused(f"--num-classes {cfg.num_classes}: the data set {dataset.name} has {dataset.classes} classes")
    validate(cfg)
    return cfg


def find_checkpoint(cfg: Config) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint that --resume asks for, and why newer ones were passed over."""
    if not cfg.resume:
        return None, []
    if cfg.resume != "auto":
        return checkpoint.load(cfg.resume), []
    found = checkpoint.newest(Path(cfg.out) / "checkpoints")
    return (found[0], [str(bad) for bad in found[1]]) if found else (None, [])


def from_rank_0(comm: Comm, find: Callable[[], T]) -> T:
    """What ``find()`` returns on rank 0, on all ranks; if it refuses there, all ranks refuse alike."""
    found, refused = None, None
    if comm.rank == 0:
        try:
            found = find()
        except Refused as error:
            refused = str(error)
    found, refused = comm.bcast((found, refused))
    if refused:
        raise Refused(refused)
    return found


def handshake(comm: Comm, facts: dict[str, object]) -> None:
    """Refuses to start unless all ranks hold the same facts; the message says who differs in what."""
    everyone = comm.gather((comm.host, facts))
    first = everyone[0][1]
    for rank, (host, theirs) in enumerate(everyone):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise Refused(f"rank {rank} on {host} has {name} {theirs.get(name)!r}, rank 0 has {value!r}: "
                              "start all ranks with the same flags, data and version")  # fmt: skip


class Session:
    """One run on this rank."""

    def __init__(self, cfg: Config, comm: Comm):
        self.comm = comm
        self.started_at = time.monotonic()
        saved, notes = from_rank_0(comm, lambda: find_checkpoint(cfg))
        self.dataset = load(cfg.dataset, cfg.seed, cfg.image, cfg.channels, cfg.num_classes)
        self.cfg = cfg = resolve(cfg, self.dataset, comm.size, from_json(saved.meta["config"]) if saved else None)
        if saved:
            check_resume(saved.meta["config"], cfg)
            if saved.meta["fingerprint"] != self.dataset.fingerprint:
                raise Refused(f"--resume {saved.path}: that run used another version of the data set {cfg.dataset}")
        self.device = Device(choose_device(cfg.device, comm.local_rank))
        self.trainer = self._in_turn(self._build)
        handshake(comm, self._facts())
        self.steps_per_epoch = steps_per_epoch(len(self.dataset.train), cfg.replicas, cfg.batch)
        self.total = planned_steps(cfg, self.steps_per_epoch)
        self.last = last_step(cfg, self.steps_per_epoch)
        self.progress = self._restore(saved)
        self.reporter = Reporter(Path(cfg.out), cfg, ranks=comm.size, enabled=comm.rank == 0)
        self.folder = Path(cfg.out) / "checkpoints"
        self.failed_saves, self.saved_step = 0, self.progress.step if saved else -1
        self.train_s, self.trained = 0.0, 0
        for note in notes:
            self.reporter.note(f"passed over {note}")

    # Setting up

    def _build(self) -> Trainer:
        cfg = self.cfg
        model = build_model(self.device, cfg, self.dataset)
        check_memory(model, cfg.replicas // self.comm.size, self.comm.local_size)
        scaler = LossScaler() if cfg.precision == "fp16" else LossScaler.disabled()
        return Trainer(model, self.comm, cfg.replicas, sync=cfg.bn == "sync", scaler=scaler,
                       first_bucket_mb=cfg.first_bucket_mb, bucket_mb=cfg.bucket_mb, check=cfg.debug)  # fmt: skip

    def _in_turn(self, build: Callable[[], Trainer]) -> Trainer:
        """The first rank of a node compiles every kernel into the shared cache, the others find it there."""
        if self.comm.local_rank:
            self.comm.node_barrier()
        trainer = build()
        if not self.comm.local_rank:
            trainer.replicas.warm()
            self.comm.node_barrier()
        return trainer

    def _facts(self) -> dict[str, object]:
        shapes = {p.name: p.shape for p in self.trainer.model.parameters}
        return {
            "version": __version__,
            "mathematics": digest(self.cfg),
            "flags": {k: v for k, v in to_json(self.cfg).items() if k not in ("device", "threads")},
            "parameter shapes": shapes,
            "buckets": [(bucket.start, bucket.stop) for bucket in self.trainer.buckets],
            "data set": self.dataset.fingerprint,
            "vector width": self.trainer.model.device.vector,
        }

    def _restore(self, saved: checkpoint.Checkpoint | None) -> Progress:
        if not saved:
            self.trainer.restore(self.comm.bcast(initial_state(self.trainer.model.state, self.cfg.seed)))
            return Progress()
        expected = {name: array.shape for name, array in self.trainer.arrays().items()}
        if expected != {name: array.shape for name, array in saved.arrays.items()}:
            raise Refused(f"--resume {saved.path}: its arrays are not those of {self.cfg.arch} with these options")
        self.trainer.restore(saved.arrays)
        self.trainer.scaler = LossScaler.from_dict(saved.meta["scaler"])
        return Progress(**saved.meta["progress"])

    # The loop

    def run(self, stop: StopFlag) -> None:
        """Trains to the end; raises Stopped after saving when any rank was asked to stop."""
        from_rank_0(self.comm, lambda: checkpoint.check_writable(self.folder))
        with self.reporter:
            self.reporter.started(self.last, self.progress.step, self.progress.samples)
            test = None
            while self.progress.step < self.last:
                test = self._epoch(stop)
            test = test or self._evaluate()
            if self.saved_step != self.progress.step:
                self._save(best=False, required=True)
            self._finish(test)

    def _epoch(self, stop: StopFlag) -> Outcome | None:
        """The rest of the current epoch; returns the test result if it was completed."""
        epoch, start = divmod(self.progress.step, self.steps_per_epoch)
        loader = Loader(self.dataset.train, order(self.cfg.seed, epoch, len(self.dataset.train)), self.cfg.replicas,
                        self.cfg.batch, self.trainer.replicas_range, start)  # fmt: skip
        for batch in loader:
            self._step(epoch, batch, stop)
            if self.progress.step == self.last and self.progress.step % self.steps_per_epoch:
                return None
        test = self._evaluate()
        p = self.progress
        trained = max(p.epoch_count, 1)
        self.reporter.epoch(epoch, p.epoch_loss / trained, p.epoch_correct / trained, test.loss / test.count,
                            test.correct / test.count)  # fmt: skip
        p.next_epoch()
        best = test.correct / test.count > p.best_accuracy
        p.best_accuracy = max(p.best_accuracy, test.correct / test.count)
        every = self.cfg.save_every_epochs
        if every and ((epoch + 1) % every == 0 or self.progress.step == self.last):
            self._save(best)
        return test

    def _step(self, epoch: int, batch: object, stop: StopFlag) -> None:
        cfg, progress, began = self.cfg, self.progress, time.monotonic()
        scaler = self.trainer.scaler
        lr = lr_at(cfg, progress.step - scaler.skipped, self.steps_per_epoch, self.total)
        hyper = Hyper(cfg.momentum, cfg.weight_decay, cfg.nesterov)
        outcome = self.trainer.step(batch.shards, batch.count, lr, hyper, seed=cfg.seed, epoch=epoch, stop=stop.requested)
        progress.count(outcome)
        seconds = time.monotonic() - began
        self.train_s += seconds
        self.trained += outcome.count
        self.reporter.step(progress.step, epoch, progress.samples, outcome.loss / outcome.count, lr, scaler.scale,
                           self.trainer.scaler.skipped, outcome.correct / outcome.count, outcome.count / seconds)  # fmt: skip
        if outcome.culprit:
            self.reporter.note(f"step {progress.step} skipped: {outcome.culprit}")
        every = cfg.save_every_steps
        if outcome.stop:
            self._save(best=False, required=True)
            raise Stopped(f"stopped on request after step {progress.step}; --resume auto goes on from there")
        if every and progress.step % every == 0:
            self._save(best=False)

    def _evaluate(self) -> Outcome:
        """The test split, each sample exactly once over all replicas."""
        total = Outcome(0, 0.0, 0)
        samples = np.arange(len(self.dataset.test))
        for batch in Loader(self.dataset.test, samples, self.cfg.replicas, self.cfg.batch, self.trainer.replicas_range):
            part = self.trainer.evaluate(batch.shards)
            total = Outcome(total.count + batch.count, total.loss + part.loss, total.correct + part.correct)
        return total

    # Leaving something behind

    def _save(self, best: bool, required: bool = False) -> None:
        """Writes a checkpoint on rank 0. A disk that is full now may not be later, so some failures are only reported."""
        failed = self._write_checkpoint(best) if self.comm.rank == 0 else ""
        failed = self.comm.bcast(failed)
        self.failed_saves = self.failed_saves + 1 if failed else 0
        if not failed:
            self.saved_step = self.progress.step
        elif required or self.failed_saves >= SAVES_THAT_MAY_FAIL:
            raise OSError(failed)
        else:
            self.reporter.note(f"WARNING: {failed}; training goes on")

    def _write_checkpoint(self, best: bool) -> str:
        meta = {
            "progress": asdict(self.progress),
            "scaler": self.trainer.scaler.to_dict(),
            "config": to_json(self.cfg),
            "fingerprint": self.dataset.fingerprint,
            "ranks": self.comm.size,
            "versions": {
                "dpresnet": __version__,
                "python": sys.version.split()[0],
                "numpy": np.__version__,
                "device": self.device.name,
                "mpi": self.comm.library,
            },
        }
        try:
            checkpoint.save(self.folder, self.progress.step, self.trainer.arrays(), meta, self.cfg.keep, best)
        except checkpoint.SaveFailed as error:
            return str(error)
        return ""

    def _finish(self, test: Outcome) -> None:
        digests = self.comm.gather((self.trainer.digest(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
        different = [rank for rank, (sha, _) in enumerate(digests) if sha != digests[0][0]]
        if different:
            raise RuntimeError(f"the parameters of ranks {different} differ from those of rank 0 at the end")
        cfg = self.cfg
        result = {
            "arch": cfg.arch,
            "dataset": self.dataset.name,
            "replicas": cfg.replicas,
            "ranks": self.comm.size,
            "precision": cfg.precision,
            "steps": self.progress.step,
            "epochs": self.progress.step / self.steps_per_epoch,
            "test_accuracy": test.correct / test.count,
            "test_loss": test.loss / test.count,
            "images_per_s": self.trained / self.train_s if self.train_s else None,
            "wall_s": time.monotonic() - self.started_at,
            "peak_rss_mb": max(megabytes for _, megabytes in digests),
            "device": self.device.name,
            "params_sha256": digests[0][0],
        }
        self.reporter.finished(result)


def build_model(device: Device, cfg: Config, dataset: Dataset) -> Model:
    """The network of a resolved configuration, for the images of a data set.

    Training crops with an eighth of the image as border and flips colour images; grey ones are mostly characters, which
    have no mirror images.
    """
    channels, height, _ = dataset.shape
    pixels = Pixels(dataset.mean, dataset.std, padding=max(1, height // 8), flip=channels == 3)
    options = Options(cfg.num_classes, cfg.stem, cfg.shortcut, cfg.block, cfg.zero_init_residual)
    return Model(device, cfg.arch, options, dataset.shape, cfg.batch, cfg.precision, cfg.label_smoothing, pixels)


def check_memory(model: Model, replicas: int, ranks_on_device: int) -> None:
    """Refuses a run that cannot fit the device, before anything is allocated."""
    private = sum(sum(model.bytes[home]) for home in ("work", "gradient", "statistic", "io"))
    shared = sum(sum(chunks) for chunks in model.bytes.values()) - private
    needed, has = (private * replicas + shared) * ranks_on_device, model.device.cl.global_mem_size
    if needed > has:
        raise Refused(
            f"--batch {model.batch}: {replicas * ranks_on_device} replicas on one node need {needed / 2**30:.1f} GiB, "
            f"{model.device.name} has {has / 2**30:.1f} GiB: use a smaller --batch or --image, or fewer replicas per node"
        )


def describe(model: Model, buckets: list[slice]) -> str:
    """What --dry-run prints: every entry of the plan, the arenas, buckets, parameters and work."""
    lines = [str(model.train.plan), ""]
    for home, chunks in model.bytes.items():
        lines.append(f"arena {home:10s} {sum(chunks) / 2**20:10.2f} MiB")
    for number, bucket in enumerate(buckets):
        lines.append(f"bucket {number:<9d} {(bucket.stop - bucket.start) * 4 / 2**20:10.2f} MiB")
    lines.append(f"{model.parameter_count:,} parameters, {model.flops_per_image / 1e6:,.1f} MFLOP per image and training step, "
                 f"{len(model.train.plan.entries)} entries")  # fmt: skip
    return "\n".join(lines)
