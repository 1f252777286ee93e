"""Dynamic loss scaling (Micikevicius et al. 2018, section 3.2) as a value: each step makes the next scaler.

Gradients of fp16 activations vanish below 2^-24. Multiplying the loss by a power of two moves them into range without
rounding; the largest scale that does not overflow is found by trying. The scaler knows nothing of arrays or ranks: the
caller agrees with all ranks on one `found_inf`, and so the scalers of all ranks stay equal.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dpresnet.errors import GaveUp

FIRST_SCALE = 2.0**16
LARGEST_SCALE = 2.0**24
SMALLEST_SCALE = 1.0
GROWTH_INTERVAL = 2000


@dataclass(frozen=True)
class LossScaler:
    """The state of loss scaling; all of it goes into a checkpoint."""

    scale: float = FIRST_SCALE
    good_steps: int = 0
    """finite steps since the scale last changed"""
    skipped: int = 0
    """steps dropped since the run began"""
    consecutive: int = 0
    """steps dropped since the last finite one"""
    ceiling: float = LARGEST_SCALE
    """the scale does not grow beyond this"""

    @classmethod
    def disabled(cls) -> "LossScaler":
        """For fp32: the scale is 1 and stays 1, and the give-up rule holds from the start."""
        return cls(scale=SMALLEST_SCALE, ceiling=SMALLEST_SCALE)

    def after(self, found_inf: bool) -> "LossScaler":
        """The scaler for the next step, `found_inf` telling whether any gradient of this one was not finite.

        Raises `GaveUp` for an overflow at scale 1, where the scale cannot be the cause any more. From the largest scale
        that takes 25 skipped steps in a row. The caller adds which layer overflowed first.
        """
        return self._smaller() if found_inf else self._larger()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for the checkpoint; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "LossScaler":
        return cls(**state)

    def _smaller(self) -> "LossScaler":
        skipped, consecutive = self.skipped + 1, self.consecutive + 1
        if self.scale <= SMALLEST_SCALE:
            raise GaveUp(
                f"non-finite gradients at loss scale {self.scale:g}, the smallest there is ({consecutive} steps in a "
                f"row, {skipped} in all): lower --lr or lengthen --warmup-epochs, and check the data"
            )
        return LossScaler(max(self.scale / 2, SMALLEST_SCALE), 0, skipped, consecutive, self.ceiling)

    def _larger(self) -> "LossScaler":
        good_steps = self.good_steps + 1
        if good_steps < GROWTH_INTERVAL:
            return LossScaler(self.scale, good_steps, self.skipped, 0, self.ceiling)
        return LossScaler(min(self.scale * 2, self.ceiling), 0, self.skipped, 0, self.ceiling)
