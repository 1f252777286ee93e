"""How long a step takes on machines that are not here: the measured kernels of one rank, the real plan of buckets and
exchanges, and what messages cost, put together event by event.

A message of n bytes takes alpha + n / beta (Hockney 1994). With P = N * L ranks on N nodes the sums of a bucket of n bytes take

    within a node     (L-1)/L * n * (1/add + 1/copy)             common memory: add a segment, copy the others
    between nodes     2 (N-1) * (alpha + n / (N beta)) + n/L * ((N-1)/N / add + 3/2 * round)

and an exchange of m bytes per rank that all ranks take part in

    host + ceil(log2 P) * alpha + (P-1) * (m / beta + merge)     all-gather by recursive doubling, then every rank merges

(costs of collectives as in Thakur, Rabenseifner and Gropp 2005, section 4). Buckets travel one after the other, and the host
works on one while the next is on its way, all while the device goes on; on a CPU the host takes its time from the kernels.
From one point where ranks meet to the next the step takes as long as on the slowest of them: the expected largest of P draws
from what was measured in several steps.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dpresnet.bench.facts import table
from dpresnet.errors import Refused

MB = 1e6


@dataclass(frozen=True)
class Machine:
    """What nodes and the links between them can do; rates are bytes per second.

    ``alpha_s`` and ``beta`` are those of messages between nodes; ``host_s`` is what an exchange takes without any message, and
    ``merge_s`` what it takes to merge the row of another rank. Seconds of a core per byte: ``round_s`` to put it into the
    wire's format and back, ``link_cpu_s`` to send and receive it. ``queue_s``: how much later a small message arrives that is
    sent after a large one. ``steals``: the device is the CPU.
    """

    alpha_s: float
    beta: float
    add: float
    copy: float
    host_s: float
    merge_s: float
    round_s: float = 0.0
    link_cpu_s: float = 0.0
    queue_s: float = 0.0
    steals: bool = False


@dataclass(frozen=True)
class Layout:
    """Ranks and how they work together. ``wire`` is the size of what travels between nodes by that in fp32."""

    nodes: int
    ranks_per_node: int = 1
    sync_bn: bool = True
    wire: float = 1.0

    @property
    def ranks(self) -> int:
        """Of the job."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Profile:
    """One step of one rank: its plan, the seconds of each launch in several steps, ``samples`` [steps, launches], and what
    follows after the plan (``tail_s``).

    Entries are {"kind": "launch"}, {"kind": "exchange", "after": number of the launch whose result is exchanged, "bytes"} and
    {"kind": "ready", "bytes"}.
    """

    entries: list[dict[str, Any]]
    tail_s: float
    samples: np.ndarray = field(repr=False)

    @property
    def seconds(self) -> float:
        """The step of a rank that is alone."""
        return self.tail_s + float(self.samples.mean(axis=0).sum())

    def lasting(self, layout: Layout) -> list[float]:
        """Seconds of each launch where every rank waits for the slowest at each exchange, or only at the end of the step."""
        seconds, begin = self.samples.mean(axis=0), 0
        for end in self._meetings(layout):
            whole = self.samples[:, begin:end].sum(axis=1)
            if whole.size and whole.mean() > 0:
                seconds[begin:end] *= largest_of(layout.ranks, whole) / whole.mean()
            begin = end
        return seconds.tolist()

    def _meetings(self, layout: Layout) -> list[int]:
        """How many launches come before each point where ranks meet."""
        found, launches = [], 0
        for entry in self.entries:
            launches += entry["kind"] == "launch"
            if entry["kind"] == "exchange" and layout.sync_bn:
                found.append(launches)
        return [*found, launches]


def largest_of(draws: int, samples: np.ndarray) -> float:
    """The expected largest of so many draws from the samples."""
    ordered, below = np.sort(samples), np.arange(samples.size + 1) / samples.size
    return float(ordered @ np.diff(below**draws))


def sum_s(nbytes: float, layout: Layout, machine: Machine) -> tuple[float, float]:
    """Seconds in which a bucket travels, and in which the host works on it."""
    nodes, ranks = layout.nodes, layout.ranks_per_node
    within = (ranks - 1) / ranks * nbytes * (1 / machine.add + 1 / machine.copy)
    if nodes == 1:
        return 0.0, within
    adding = nbytes / ranks * ((nodes - 1) / nodes / machine.add + 1.5 * machine.round_s)
    travelling = 2 * (nodes - 1) * (machine.alpha_s + layout.wire * nbytes / nodes / machine.beta)
    sent = 2 * (nodes - 1) / nodes * layout.wire * nbytes / ranks
    return travelling, within + adding + sent * machine.link_cpu_s


def exchange_s(nbytes: float, layout: Layout, machine: Machine) -> float:
    """Seconds in which a rank takes part in an exchange of statistics."""
    if layout.ranks == 1:
        return 0.0
    beta, alpha_s = (machine.beta, machine.alpha_s) if layout.nodes > 1 else (machine.copy, 0.0)
    messages = math.ceil(math.log2(layout.ranks)) * alpha_s
    return machine.host_s + messages + (layout.ranks - 1) * (nbytes / beta + machine.merge_s)


def project(profile: Profile, layout: Layout, machine: Machine) -> dict[str, float]:
    """Seconds of a step: in all, in which exchanges held the device up, in which gradients were under way, and of these
    after the end of backward.
    """
    device = host = link = summed = 0.0  # until when each is busy
    ends: list[float] = []  # of the launches
    lasting = profile.lasting(layout)
    held = under_way = 0.0
    for entry in profile.entries:
        if entry["kind"] == "launch":
            held += max(0.0, host - device)
            device = max(device, host) + lasting[len(ends)]
            ends.append(device)
        elif entry["kind"] == "exchange" and layout.sync_bn and layout.ranks > 1:
            begin = max(host, ends[entry["after"]])
            queued = min(machine.queue_s, max(0.0, link - begin)) if layout.nodes > 1 else 0.0
            host = begin + queued + exchange_s(entry["bytes"], layout, machine)
        elif entry["kind"] == "ready" and layout.ranks > 1:
            travelling, computing = sum_s(entry["bytes"], layout, machine)
            under_way += travelling + computing
            link = max(link, device) + travelling
            summed = max(link, summed) + computing
            device += computing * machine.steals
    exposed = max(0.0, summed - device)
    losses = exchange_s(24, layout, machine)
    return {
        "step_s": device + exposed + losses + profile.tail_s,
        "held_s": held + losses,
        "under_way_s": under_way,
        "exposed_s": exposed,
    }


# ---- what the flags say

RATES = {"kbit": 1e3 / 8, "Mbit": 1e6 / 8, "Gbit": 1e9 / 8, "MB": 1e6, "GB": 1e9}
TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def quantity(text: str, units: dict[str, float], flag: str) -> float:
    """A positive number with one of these units, such as 100Gbit."""
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]+)", text)
    try:
        value = float(found[1]) * units[found[2]]
    except (TypeError, KeyError, ValueError):
        value = 0.0
    if not value > 0:
        raise Refused(f"{flag} {text}: a number and one of {', '.join(units)}, such as {flag} 10{list(units)[1]}")
    return value


def counts(text: str) -> list[int]:
    """1..8 stands for 1, 2, 4, 8; or numbers joined by commas."""
    try:
        if ".." in text:
            first, last = map(int, text.split(".."))
            found = [first * 2**i for i in range(64) if first * 2**i <= last] if first > 0 else []
        else:
            found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise Refused(f"--nodes {text}: from..to, such as 1..1024, or numbers joined by commas")
    return found


# ---- the table


def rows(profile: Profile, nodes: list[int], layout: Layout, machine: Machine) -> list[dict[str, float]]:
    """The projection of each number of nodes, with its efficiency: the step of one rank alone by that of all."""
    found = []
    for count in nodes:
        here = replace(layout, nodes=count)
        projected = project(profile, here, machine)
        found.append({"nodes": count, "ranks": here.ranks, **projected, "efficiency": profile.seconds / projected["step_s"]})
    return found


def text(projected: list[dict[str, float]], batch: int) -> str:
    """What is printed."""
    cells = [
        [f"{row['nodes']}", f"{row['ranks']}", f"{1e3 * row['step_s']:.1f}", f"{batch * row['ranks'] / row['step_s']:.0f}",
         f"{row['efficiency']:.3f}", *(f"{1e3 * row[key]:.1f}" for key in ("held_s", "under_way_s", "exposed_s"))]
        for row in projected
    ]  # fmt: skip
    titles = ["nodes", "ranks", "ms", "images/s", "efficiency", "held by exchanges", "gradients under way", "exposed"]
    return table(titles, cells)
