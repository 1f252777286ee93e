"""Whether training waits for its images: the share of a number of steps that passed before their images were there."""

from dataclasses import dataclass

INTERVAL = 100  # steps that are judged together
MOST = 0.1  # of their time, and waiting is worth a warning


@dataclass
class Stall:
    """Seconds since the last judgement."""

    steps: int = 0
    waited_s: float = 0.0
    total_s: float = 0.0

    def add(self, waited_s: float, seconds: float) -> str:
        """Counts a step of ``seconds``, of which it waited ``waited_s`` for its images; a warning if an interval ends in which
        steps waited for more than MOST of their time, else "".
        """
        self.steps += 1
        self.waited_s += waited_s
        self.total_s += seconds
        if self.steps < INTERVAL:
            return ""
        share, steps = self.waited_s / max(self.total_s, 1e-9), self.steps
        self.steps, self.waited_s, self.total_s = 0, 0.0, 0.0
        if share <= MOST:
            return ""
        return (f"WARNING: the last {steps} steps waited for their images for {share:.0%} of the time: raise --data-mb until "
                "the data set stays in memory, or move it to a faster disk")  # fmt: skip
