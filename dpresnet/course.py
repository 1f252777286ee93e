"""The course of a run: the state, the samples and the learning rate of each step, and nothing of what a run leaves behind.

Everything of a run that is not a constant is in the trained arrays and the loss scaler of its `Trainer` and in its `Progress`:
position, best accuracy, running sums of the epoch. A checkpoint holds exactly that, so a run goes on bit for bit, and can be
repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from dpresnet.amp import LossScaler
from dpresnet.checkpoint import Checkpoint
from dpresnet.config import Config, global_batch
from dpresnet.data import Batch, Dataset, Loader, in_steps, order, steps_per_epoch
from dpresnet.errors import Refused
from dpresnet.initial import initial_state
from dpresnet.schedule import last_step, lr_at, planned_steps
from dpresnet.trail import Trail
from dpresnet.trainer import Hyper, Outcome, Trainer


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

    def close_epoch(self) -> tuple[float, float]:
        """Loss and accuracy of the epoch, whose sums begin anew."""
        count = max(self.epoch_count, 1)
        found = self.epoch_loss / count, self.epoch_correct / count
        self.epoch_loss, self.epoch_correct, self.epoch_count = 0.0, 0, 0
        return found


class Course:
    """The steps of a run with a resolved configuration, from its begin or from a checkpoint on."""

    def __init__(self, cfg: Config, dataset: Dataset, trainer: Trainer):
        self.cfg, self.dataset, self.trainer = cfg, dataset, trainer
        self.steps_per_epoch = steps_per_epoch(len(dataset.train), global_batch(cfg))
        self.total = planned_steps(cfg, self.steps_per_epoch)
        self.last = last_step(cfg, self.steps_per_epoch)
        self.progress = Progress()

    def begin(self, saved: Checkpoint | None) -> None:
        """Sets the state: that of a checkpoint, or the initial one. Refused if the checkpoint is of another network."""
        if not saved:
            self.trainer.restore(self.trainer.comm.bcast(initial_state(self.trainer.model.state, self.cfg.seed)))
            self.progress = Progress()
            return
        expected = {name: array.shape for name, array in self.trainer.arrays().items()}
        if expected != {name: array.shape for name, array in saved.arrays.items()}:
            raise Refused(f"checkpoint {saved.path}: its arrays are not those of {self.cfg.arch} with these options")
        self.trainer.restore(saved.arrays)
        self.trainer.scaler = LossScaler.from_dict(saved.meta["scaler"])
        self.progress = Progress(**saved.meta["progress"])

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether the last step completed an epoch."""
        return self.progress.step % self.steps_per_epoch == 0

    @property
    def lr(self) -> float:
        """Learning rate of the next step; skipped ones do not advance the schedule."""
        return lr_at(self.cfg, self.progress.step - self.trainer.scaler.skipped, self.steps_per_epoch, self.total)

    def rest_of_epoch(self) -> Iterator[tuple[int, list[Batch]]]:
        """(epoch, micro-batches) of each step from the present one to the end of its epoch."""
        cfg, trainer = self.cfg, self.trainer
        epoch, start = divmod(self.progress.step, self.steps_per_epoch)
        samples = order(cfg.seed, epoch, len(self.dataset.train))
        draw = partial(trainer.model.pixels.augmentation.drawn, cfg.seed, epoch)
        loader = Loader(self.dataset.train, samples, cfg.replicas, cfg.batch, trainer.replicas_range,
                        start * cfg.accumulate, ahead=max(2, cfg.accumulate), draw=draw)  # fmt: skip
        for micro_batches in in_steps(loader, cfg.accumulate):
            yield epoch, micro_batches

    def step(self, micro_batches: list[Batch], stop: bool = False, trail: Trail | None = None) -> Outcome:
        """Trains on one global batch; ``trail`` gets what every entry has written."""
        cfg, self.trainer.trail = self.cfg, trail
        hyper = Hyper(cfg.momentum, cfg.weight_decay, cfg.nesterov)
        shards, count = [batch.shards for batch in micro_batches], sum(batch.count for batch in micro_batches)
        outcome = self.trainer.step(shards, count, self.lr, hyper, stop=stop)
        self.trainer.trail = None
        self.progress.count(outcome)
        return outcome

    def evaluate(self) -> Outcome:
        """The test split, each sample exactly once over all replicas; ``culprit`` is the first of all its batches."""
        total, samples = Outcome(0, 0.0, 0), np.arange(len(self.dataset.test))
        cfg, trainer = self.cfg, self.trainer
        for batch in Loader(self.dataset.test, samples, cfg.replicas, cfg.batch, trainer.replicas_range,
                            draw=trainer.model.pixels.augmentation.centred):  # fmt: skip
            part = trainer.evaluate(batch.shards)
            total = Outcome(total.count + batch.count, total.loss + part.loss, total.correct + part.correct,
                            culprit=total.culprit or part.culprit)  # fmt: skip
        return total
