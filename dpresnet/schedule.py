"""The learning rate as a pure function of the step: nothing to save, and a resumed run cannot get it wrong."""

import math

from dpresnet.config import Config, global_batch


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
    it, is the first to run at the peak.
    """
    warmup = round(cfg.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return _peak(cfg) * (step + 1) / (warmup + 1)
    return _peak(cfg) * _decay(cfg.schedule, step, warmup, total_steps)


def _peak(cfg: Config) -> float:
    if cfg.replicas < 1:
        raise ValueError("the schedule needs a resolved configuration: replicas is still 0")
    return cfg.lr * global_batch(cfg) / 256


def _decay(schedule: str, step: int, warmup: int, total_steps: int) -> float:
    """The factor after the warm-up; 1 at its end.

    The cosine is that of Loshchilov and Hutter 2017, equation 5, without restarts; it is 0 at `total_steps`, one step
    behind the last. The steps at 1/2 and 3/4 are those of He et al. 2016, section 4.2 (32k and 48k of 64k).
    """
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 0.1 ** ((2 * step >= total_steps) + (4 * step >= 3 * total_steps))
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * progress))
