"""The learning rate as a pure function of the step: nothing to save, and a resumed run cannot get it wrong."""

import math

from dpresnet.config import Config, global_batch, milestones_of

FIRST_OF_CYCLE, LAST_OF_CYCLE = 1 / 25, 1 / 25e4  # shares of the peak at which onecycle begins and ends


def planned_steps(cfg: Config, steps_per_epoch: int) -> int:
    """The steps that the schedule spans. ``--steps`` does not bend it: a short run is a prefix of the long one."""
    return cfg.epochs * steps_per_epoch


def last_step(cfg: Config, steps_per_epoch: int) -> int:
    """The number of steps after which the run ends: all planned ones, or ``--steps`` if that is fewer."""
    planned = planned_steps(cfg, steps_per_epoch)
    return min(planned, cfg.steps) if cfg.steps else planned


def lr_at(cfg: Config, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of step `step` (from 0) of a schedule over `total_steps`, see `planned_steps`.

    The peak grows with the global batch, lr * global batch / 256, and is reached in equal increments over the
    warm-up (Goyal et al. 2017, sections 2.1 and 2.2). The warm-up divides by w + 1 so that step w, the first one after
    it, is the first to run at the peak. One cycle begins at a share of the peak instead.
    """
    warmup = round(cfg.warmup_epochs * steps_per_epoch)
    if step >= warmup:
        return _peak(cfg) * _decay(cfg, step, warmup, steps_per_epoch, total_steps)
    if cfg.schedule == "onecycle":
        return _peak(cfg) * (FIRST_OF_CYCLE + (1 - FIRST_OF_CYCLE) * step / warmup)
    return _peak(cfg) * (step + 1) / (warmup + 1)


def _peak(cfg: Config) -> float:
    if cfg.replicas < 1:
        raise ValueError("the schedule needs a resolved configuration: replicas is still 0")
    return cfg.lr * global_batch(cfg) / 256


def _decay(cfg: Config, step: int, warmup: int, steps_per_epoch: int, total_steps: int) -> float:
    """The factor after the warm-up; 1 at its end.

    The cosine is that of Loshchilov and Hutter 2017, equation 5, without restarts; cosine, polynomial and the fall of one cycle
    (Smith and Topin 2019, section 4) reach their ends at `total_steps`, one step behind the last. The steps at 1/2 and 3/4 are
    those of He et al. 2016, section 4.2 (32k and 48k of 64k).
    """
    if cfg.schedule == "constant":
        return 1.0
    if cfg.schedule == "step":
        return cfg.gamma ** _milestones_passed(cfg, step, steps_per_epoch, total_steps)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    left = (1 - progress) ** cfg.power if cfg.schedule == "polynomial" else cosine
    last = LAST_OF_CYCLE if cfg.schedule == "onecycle" else cfg.final_lr
    return last + (1 - last) * left


def _milestones_passed(cfg: Config, step: int, steps_per_epoch: int, total_steps: int) -> int:
    """How many milestones lie at a step or before it."""
    if cfg.milestones:
        return sum(step >= round(epoch * steps_per_epoch) for epoch in milestones_of(cfg))
    return (2 * step >= total_steps) + (4 * step >= 3 * total_steps)
