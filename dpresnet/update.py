"""How parameters change once the gradients of a step are summed: recorded plans over whole arenas, and the arrays through which
the host steers them. `dpresnet.optimizer` fills those in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpresnet.device import Device
from dpresnet.ops import optimizer
from dpresnet.ops.optimizer import SLOT, Table
from dpresnet.plan import Constant, Plan, Tensor, place_in_order
from dpresnet.state import FLOAT, Parameter

INT = np.dtype(np.int32)
TRAINED = ("parameter", "momentum", "second_moment", "buffer", "ema_parameter", "ema_buffer")  # homes of what a run has learnt


@dataclass(frozen=True)
class Rule:
    """What is recorded of an update: ``optimizer`` sgd, lars or adamw; ``decay`` of all parameters or of weights only; whether
    the norm of the gradients is limited (``clip``) and whether there is a moving average of the state (``ema``).
    """

    optimizer: str = "sgd"
    decay: str = "all"
    clip: bool = False
    ema: bool = False

    @property
    def normed(self) -> tuple[str, ...]:
        """Homes of the arenas whose norms are needed."""
        return ("gradient", "parameter") if self.optimizer == "lars" else ("gradient",) if self.clip else ()

    @property
    def of_parameters(self) -> dict[str, str]:
        """What is kept of each parameter: the group of a checkpoint and the field of `Parameter`."""
        kept = {"param": "value", "momentum": "momentum"}
        kept |= {"second_moment": "second_moment"} if self.optimizer == "adamw" else {}
        return kept | ({"ema_param": "ema"} if self.ema else {})

    @property
    def of_buffers(self) -> dict[str, str]:
        """The same for running statistics and `Buffer`."""
        return {"buffer": "value"} | ({"ema_buffer": "ema"} if self.ema else {})


SGD = Rule()


def decays(parameter: Parameter) -> bool:
    """Whether a parameter is a weight: neither scale nor shift of a normalisation nor a bias, all of which have one axis."""
    return len(parameter.shape) > 1


class Update:
    """The plans ``check``, ``norms``, ``apply`` and ``average`` for ``parameters`` that lie in this order in arenas of
    ``nbytes`` by home.
    """

    def __init__(self, device: Device, precision: str, parameters: Sequence[Parameter], nbytes: Mapping[str, list[int]],
                 rule: Rule):  # fmt: skip
        self.parameters = parameters
        self.check, self.norms, self.apply, self.average = (Plan(device, precision) for _ in range(4))
        arenas = {home: _arena(home, nbytes[home][0]) for home in (*TRAINED, "gradient") if nbytes[home]}
        self.hyper = Tensor("hyper", (1,), optimizer.HYPER, "update")
        items = optimizer.check_items(self.check, arenas["gradient"].size)
        self.found = Tensor("found", (items,), INT, "update")
        optimizer.check(self.check, "check", arenas["gradient"], self.found)
        self.table = self._record_table(rule)
        self.sums = self._record_norms(rule, arenas)
        self._record_optimizer(rule, arenas)
        if rule.ema:
            for home in ("parameter", "buffer"):
                optimizer.average(self.average, f"average.{home}", arenas[f"ema_{home}"], arenas[home], self.hyper)
        rates = [self.table.rates] if self.table else []
        self.nbytes = place_in_order([self.hyper, self.found, *rates, *self.sums.values()])

    @property
    def plans(self) -> list[Plan]:
        """All of them, in the order in which a step replays them."""
        return [self.check, self.norms, self.apply, self.average]

    def _record_table(self, rule: Rule) -> Table | None:
        if rule.optimizer != "lars" and rule.decay == "all":
            return None
        slots = [-(-parameter.value.size // SLOT) for parameter in self.parameters]
        owner = np.repeat(np.arange(len(slots), dtype=np.int32), slots)
        return Table(Constant(owner), Tensor("rates", (len(slots),), optimizer.RATE, "update"))

    def _record_norms(self, rule: Rule, arenas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of squares by home; ``self.chunks`` says which of them belong to each parameter."""
        cuts = [optimizer.cut(p.value.place[1] // 4, p.value.size) for p in self.parameters] if rule.normed else []
        ends = np.cumsum([len(cut) for cut in cuts]).tolist()
        self.chunks = [slice(end - len(cut), end) for end, cut in zip(ends, cuts, strict=True)]
        sums = {}
        if rule.normed:
            chunks = Constant(np.array([chunk for cut in cuts for chunk in cut], np.int32))
            for home in rule.normed:
                sums[home] = Tensor(f"{home}.squares", (ends[-1],), FLOAT, "update")
                optimizer.squares(self.norms, f"{home}.squares", arenas[home], chunks, sums[home])
        return sums

    def _record_optimizer(self, rule: Rule, arenas: Mapping[str, Tensor]) -> None:
        homes = ["parameter", "gradient", "momentum"] + ["second_moment"] * (rule.optimizer == "adamw")
        append = {"sgd": optimizer.sgd, "lars": optimizer.lars, "adamw": optimizer.adamw}[rule.optimizer]
        append(self.apply, "update", *(arenas[home] for home in homes), self.hyper, self.table)


def _arena(home: str, nbytes: int) -> Tensor:
    """All of a home."""
    return Tensor(home, (nbytes // 4,), FLOAT, home, place=(0, 0))
