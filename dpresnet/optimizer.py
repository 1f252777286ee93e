"""The host's part of an update: what each step's hyperparameters are, norms of gradients, and what is done about them.

Every rank holds the same summed gradients, computes the same numbers from them and updates its parameters alike. Squares are
added on the device over ranges of a fixed size, and those sums exactly (`math.fsum`): a norm depends neither on ranks nor on
vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpresnet.ops.optimizer import HYPER
from dpresnet.replicas import Replicas
from dpresnet.update import decays


@dataclass(frozen=True)
class Hyper:
    """Constants of the optimizer; each uses its own. ``clip_norm`` and ``ema`` count where the model was recorded for them."""

    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    trust: float = 0.001
    clip_norm: float = 0.0
    ema: float = 0.0


class Optimizer:
    """Updates what the replicas of a process share."""

    def __init__(self, replicas: Replicas):
        self._replicas, self._memory, self._rule = replicas, replicas.memory, replicas.model.rule
        self._update = replicas.model.update
        self._squares: dict[str, list[float]] = {}  # by home, of the last gradients

    def overflowed(self) -> bool:
        """Whether the summed gradients hold an infinity or NaN, or are so large that their squares do."""
        self._replicas.run_shared(self._update.check)
        self._replicas.run_shared(self._update.norms)
        if self._memory.read(self._update.found).any():
            return True
        self._squares = {home: self._memory.read(sums).tolist() for home, sums in self._update.sums.items()}
        return not all(map(math.isfinite, self._squares.get("gradient", ())))

    def norm(self, scale: float) -> float | None:
        """Euclidean norm of the gradients that `overflowed` has looked at, without the loss scale; None if nobody needs it."""
        return math.sqrt(math.fsum(self._squares["gradient"])) / scale if self._rule.clip else None

    def step(self, lr: float, hyper: Hyper, scale: float, updates: int) -> None:
        """Changes the parameters after ``updates`` updates, by gradients that carry the loss ``scale``."""
        values = np.zeros(1, HYPER)
        for name in ("momentum", "weight_decay", "nesterov", "beta1", "beta2", "eps"):
            values[name] = getattr(hyper, name)
        factor = self._kept(hyper, scale) / scale
        values["lr"], values["grad_factor"] = lr, factor
        values["fresh1"], values["fresh2"] = 1 - hyper.beta1, 1 - hyper.beta2
        values["correct1"] = 1 / (1 - hyper.beta1 ** (updates + 1))
        values["correct2"] = 1 / math.sqrt(1 - hyper.beta2 ** (updates + 1))
        values["share"] = 1 - ema_decay(hyper.ema, updates)
        self._memory.write(self._update.hyper, values)
        if self._update.table:
            self._memory.write(self._update.table.rates, self._rates(hyper, factor))
        self._replicas.run_shared(self._update.apply)

    def average(self) -> None:
        """Moves the averages towards the parameters and running statistics that the step has left."""
        self._replicas.run_shared(self._update.average)

    def _kept(self, hyper: Hyper, scale: float) -> float:
        """The share of the gradients that their largest norm allows (Pascanu et al. 2013, algorithm 1)."""
        norm = self.norm(scale)
        return hyper.clip_norm / norm if norm and norm > hyper.clip_norm else 1.0

    def _rates(self, hyper: Hyper, factor: float) -> np.ndarray:
        """What each parameter gets: trust ratio and weight decay, RATE [parameters]."""
        rates = np.ones(len(self._update.parameters), self._update.table.rates.dtype)
        for rate, number in zip(rates, range(len(rates)), strict=True):
            if self._rule.decay == "weights" and not decays(self._update.parameters[number]):
                rate["weight_decay"] = 0.0
                continue
            rate["weight_decay"] = hyper.weight_decay
            if self._rule.optimizer == "lars":
                chunks = self._update.chunks[number]
                param, grad = (math.sqrt(math.fsum(self._squares[home][chunks])) for home in ("parameter", "gradient"))
                rate["trust"] = trust_ratio(param, grad * factor, hyper)
        return rates


def trust_ratio(param: float, grad: float, hyper: Hyper) -> float:
    """The local learning rate of LARS (You et al. 2017, equation 6) by the norms of a parameter and of its gradient.

    1 where either norm is 0: a parameter that begins at zero would stay there.
    """
    return hyper.trust * param / (grad + hyper.weight_decay * param) if param and grad else 1.0


def ema_decay(decay: float, updates: int) -> float:
    """What an average keeps of itself after ``updates`` updates: less at the beginning, so that it forgets where it began."""
    return min(decay, (1 + updates) / (10 + updates))
