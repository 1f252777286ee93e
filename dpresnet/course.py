"""The course of a run: the state, the samples and the learning rate of each step, and nothing of what a run leaves behind.

Everything of a run that is not a constant is in the trained arrays and the loss scaler of its `Trainer` and in its `Progress`:
position, best accuracy, running sums of the epoch. A checkpoint holds exactly that, so a run goes on bit for bit, and can be
repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from dpresnet.amp import LossScaler
from dpresnet.checkpoint import Checkpoint
from dpresnet.config import Config, global_batch
from dpresnet.data import Batch, Dataset, Loader, Split, in_steps, order, steps_per_epoch
from dpresnet.errors import Refused
from dpresnet.evaluation import Evaluation, answers, joined
from dpresnet.initial import initial_state
from dpresnet.optimizer import Hyper
from dpresnet.schedule import last_step, lr_at, planned_steps
from dpresnet.trail import Trail
from dpresnet.trainer import Outcome, Trainer


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
        self.hyper = Hyper(**{spec.name: getattr(cfg, spec.name) for spec in fields(Hyper)})

    def begin(self, saved: Checkpoint | None) -> None:
        """Sets the state: that of a checkpoint, or the initial one. Refused if the checkpoint is of another network."""
        model = self.trainer.model
        if not saved:
            self.trainer.restore(self.trainer.comm.bcast(initial_state(model.state, self.cfg.seed, model.rule)))
            self.progress = Progress()
            return
        check_arrays(self.trainer, saved, self.cfg)
        self.trainer.restore(saved.arrays)
        self.trainer.scaler = LossScaler.from_dict(saved.meta["scaler"])
        self.progress = Progress(**saved.meta["progress"])

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether the last step completed an epoch."""
        return self.progress.step % self.steps_per_epoch == 0

    @property
    def updates(self) -> int:
        """How often the parameters have been updated; skipped steps do not count."""
        return self.progress.step - self.trainer.scaler.skipped

    @property
    def lr(self) -> float:
        """Learning rate of the next step; skipped ones do not advance the schedule."""
        return lr_at(self.cfg, self.updates, self.steps_per_epoch, self.total)

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
        self.trainer.trail = trail
        shards, count = [batch.shards for batch in micro_batches], sum(batch.count for batch in micro_batches)
        outcome = self.trainer.step(shards, count, self.lr, self.hyper, updates=self.updates, stop=stop)
        self.trainer.trail = None
        self.progress.count(outcome)
        return outcome

    def evaluate(self) -> dict[str, Evaluation]:
        """The parameters and, if there are any, their moving averages on the test split."""
        loader = in_order(self.trainer, self.dataset.test, self.cfg.replicas, self.cfg.batch)
        kinds = {"": False} | ({"ema_": True} if self.trainer.model.rule.ema else {})
        return {before: evaluation(self.trainer, loader, averaged) for before, averaged in kinds.items()}


def in_order(trainer: Trainer, split: Split, replicas: int, batch: int) -> Loader:
    """The samples of a split as they are, each exactly once over all replicas."""
    return Loader(split, np.arange(len(split)), replicas, batch, trainer.replicas_range,
                  draw=trainer.model.pixels.augmentation.centred)  # fmt: skip


def evaluation(trainer: Trainer, batches: Iterable[Batch], averaged: bool = False) -> Evaluation:
    """What the network, or the moving average of its parameters, answers to all batches; ``culprit`` is the first of them."""
    loss, culprit, parts = 0.0, "", []
    for batch in batches:
        outcome = trainer.evaluate(batch.shards, averaged)
        loss, culprit = loss + outcome.loss, culprit or outcome.culprit
        shown = zip(trainer.logits(batch.shards), batch.shards, strict=True)
        parts += [answers(logits, shard.labels) for logits, shard in shown]
    trainer.comm.events.what = "answers"
    return Evaluation(trainer.model.options.num_classes, loss, joined(trainer.comm.gather(joined(parts))), culprit)


def check_arrays(trainer: Trainer, saved: Checkpoint, cfg: Config) -> None:
    """Refuses a checkpoint of another network, or one that lacks what the optimizer keeps."""
    expected = {name: array.shape for name, array in trainer.arrays().items()}
    if lacking := sorted(expected.keys() - saved.arrays.keys()):
        needs = f"{cfg.arch} with --optimizer {cfg.optimizer} and --ema {cfg.ema} needs"
        raise Refused(f"checkpoint {saved.path} lacks {lacking[0]}, which {needs}: resume from another, or start anew")
    if expected != {name: array.shape for name, array in saved.arrays.items()}:
        raise Refused(f"checkpoint {saved.path}: its arrays are not those of {cfg.arch} with these options")
