"""Measures the sizes of the convolution kernels for the launches of one network, see `dpresnet.tiles`.

The launches are those that recording the network asks sizes for. Each is timed by itself on arenas of its own, and all
candidates take turns in every round, so that other work on the machine strikes them alike: what counts is the median of the
ratios within the rounds. A size is chosen after the other, starting from the shipped ones, and the result has to beat those
once more. Import after `dpresnet.environment.prepare`: this loads OpenCL.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pyopencl as cl

from dpresnet.convolution import Conv
from dpresnet.device import Arena, Device
from dpresnet.model import Model
from dpresnet.ops import conv as direct
from dpresnet.ops import winograd
from dpresnet.plan import Constant, Launch, Local, Memory, Plan, Tensor, bind_launch, place_by_liveness
from dpresnet.resnet import Options
from dpresnet.tiles import SHIPPED_ONLY, Sizes, Tuned

# What is tried of each size. Rows: as many as leave registers for the weights (see tiles.SHIPPED), and 7, which divides the
# widths of images that began with 224 pixels.
ROWS = (4, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28)
REGISTERS = {16: 32, 8: 16}
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "conv_gather": {"pixels": (96, 192, 384, 784, 1568), "groups": (1, 2, 4, 8, 16)},
    "conv_weight": {"pixels": (32, 64, 128, 256, 512), "panel": (32, 64, 128, 256), "groups": (2, 4, 8, 16, 64)},
    "winograd_gather": {"tiles": (1, 2, 3, 4), "chunk": (1, 2, 4, 8), "panel": (64, 128, 256, 512)},
    "winograd_weight": {"tiles": (8, 16, 32, 64), "panel": (32, 64, 128)},
}
LEAST_GAIN = 0.02  # of the time: less is noise
BURST_S, LEAST_BURST, MOST_BURST = 2e-3, 4, 64  # launches in a row: threads that slept are awake then
HOPELESS = 1.5  # times the fastest: not measured again
ONES = 0x3C00  # in every two bytes: 1 as fp16, small as fp32; zeroed memory might not even be there


@dataclass(frozen=True)
class Task:
    """A launch of a network whose sizes can be chosen."""

    conv: Conv
    kernel: str
    transposed: bool

    @property
    def key(self) -> str:
        """As in the file."""
        return self.conv.key(self.kernel, self.transposed)


@dataclass
class Found:
    """Result of a task: the shipped sizes and the chosen ones (the same objects if nothing is better), seconds of either."""

    task: Task
    shipped: Sizes
    chosen: Sizes
    shipped_s: float
    chosen_s: float
    tried: int

    @property
    def gain(self) -> float:
        """Share of the shipped time that is saved."""
        return 1 - self.chosen_s / self.shipped_s

    @property
    def better(self) -> Sizes | None:
        """What belongs into the file."""
        return self.chosen if self.chosen != self.shipped else None


@dataclass(frozen=True)
class Asked(Tuned):
    """Knows no sizes, and keeps what it is asked for."""

    tasks: dict[str, Task] = field(default_factory=dict)

    def find(self, conv: Conv, kernel: str, transposed: bool) -> None:
        """Notes the launch."""
        task = Task(conv.shipped, kernel, transposed)
        self.tasks.setdefault(task.key, task)


def tasks_of(device: Device, arch: str, options: Options, image: int, batch: int, precision: str, infer: bool) -> list[Task]:
    """The launches of a network that differ, in the order of the first of each; of evaluation only with ``infer``."""
    device.tuned = asked = Asked()
    try:
        Model(device, arch, options, (3, image, image), batch, precision)
    finally:
        device.tuned = SHIPPED_ONLY
    return [task for task in asked.tasks.values() if not infer or " forward " in task.key]


def plan_of(device: Device, task: Task, sizes: Sizes) -> Plan:
    """One launch with these sizes (and, for a gradient of weights, what adds its parts)."""
    conv = replace(task.conv, tuned=Tuned({task.key: sizes}))
    plan = Plan(device, conv.precision)
    ops = winograd if task.kernel.startswith("winograd") else direct
    x = plan.image("x", conv.images, conv.in_channels, conv.height, conv.width)
    y = plan.image("y", conv.images, conv.out_channels, conv.out_height, conv.out_width)
    if task.kernel.endswith("weight"):
        weights = (conv.out_channels, conv.in_channels // conv.groups, conv.kernel, conv.kernel)
        ops.backward_weight(plan, "weight", conv, x, y, Tensor("dw", weights, np.dtype(np.float32)))
    else:
        packed = Tensor("packed", ops.packed_shape(conv, task.transposed), np.dtype(np.float32))
        ends = (y, packed, x) if task.transposed else (x, packed, y)
        ops.gather(plan, "gather", conv, *ends, task.transposed)
    return plan


def launch_of(plan: Plan) -> Launch:
    """The one that is measured."""
    return plan.entries[0]


def signature(launch: Launch) -> tuple:
    """Equal for sizes that come to the same."""
    tables = tuple(a.data.tobytes() for a in launch.args if isinstance(a, Constant))
    return launch.size, launch.defines, tables, tuple(a.nbytes for a in launch.args if isinstance(a, Local))


def choices(task: Task, name: str, sizes: Sizes) -> list[Sizes]:
    """The candidates for one size, the others as they are."""
    if name != "rows":
        return [replace(sizes, **{name: value}) for value in CHOICES[task.kernel][name]]
    conv, vectors = task.conv, task.conv.tile_vectors(task.transposed)
    most = (REGISTERS[conv.vector] - 4) // vectors  # for weights and addresses
    step = conv.small_group if task.kernel == "conv_weight" and conv.small_group % conv.vector else 1
    return [replace(sizes, rows=rows) for rows in ROWS if rows * vectors >= 6 and rows <= most and rows % step == 0]


def filled(device: Device, nbytes: int) -> Arena:
    """Memory whose values are ordinary numbers, in fp16 as in fp32."""
    arena = device.arena(nbytes)
    arena.view(0, (arena.nbytes // 2,), np.uint16)[:] = ONES
    arena.push(0, arena.nbytes)
    return arena


class Bench:
    """Times the candidates of one task, on arenas that they share."""

    def __init__(self, device: Device, task: Task):
        self.device, self.task, self._constants = device, task, {}
        plan = plan_of(device, task, task.conv.sizes(task.kernel, task.transposed))
        limit = device.cl.max_mem_alloc_size
        self._memory = Memory({"work": [filled(device, nbytes) for nbytes in place_by_liveness(plan, limit)]})
        self._seconds = 0.0  # of a launch, about
        self._ready: dict[tuple, tuple[Launch, cl.Kernel]] = {}  # launches are kept: constants are known by their identity

    def bound(self, sizes: Sizes) -> tuple:
        """Makes a launch with these sizes ready; its signature."""
        plan = plan_of(self.device, self.task, sizes)
        launch = launch_of(plan)
        if (known := signature(launch)) not in self._ready:
            place_by_liveness(plan, self.device.cl.max_mem_alloc_size)
            kernel = bind_launch(self.device, launch, self._memory, self._constants)
            self._ready[known] = launch, kernel
            self.time(known)  # compiles
        return known

    def time(self, known: tuple) -> float:
        """Seconds of a launch, the mean of some in a row."""
        launch, kernel = self._ready[known]
        count = LEAST_BURST
        if self._seconds:
            count = min(MOST_BURST, max(LEAST_BURST, math.ceil(BURST_S / self._seconds)))
        events = [self.device.enqueue(kernel, launch.size) for _ in range(1 + count)]
        self.device.finish()
        seconds = 1e-9 * max(1, events[-1].profile.end - events[0].profile.end) / count
        self._seconds = seconds
        return seconds

    @property
    def tried(self) -> int:
        """Candidates that differ."""
        return len(self._ready)

    def compare(self, known: Iterable[tuple], rounds: int) -> dict[tuple, list[float]]:
        """Seconds of each candidate in each round. One that is hopeless is left out from then on, but not the first."""
        running = dict.fromkeys(known)
        first = next(iter(running))
        samples: dict[tuple, list[float]] = {candidate: [] for candidate in running}
        for _ in range(rounds):
            for candidate in running:
                samples[candidate].append(self.time(candidate))
            fastest = min(min(found) for found in samples.values())
            running = {c: None for c in running if c == first or min(samples[c]) <= HOPELESS * fastest}
        return samples


def ratio(samples: dict[tuple, list[float]], candidate: tuple, other: tuple) -> float:
    """Time of a candidate by that of another: median over the rounds that have both."""
    pairs = zip(samples[candidate], samples[other], strict=False)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def least_ratio(samples: dict[tuple, list[float]], candidates: list[tuple]) -> tuple:
    """The candidate that is fastest beside the first one; the first itself if none is faster."""
    return min(candidates, key=lambda candidate: ratio(samples, candidate, candidates[0]))


def choose(device: Device, task: Task, rounds: int) -> Found:
    """Measures one task."""
    bench = Bench(device, task)
    shipped = best = task.conv.sizes(task.kernel, task.transposed)
    base = bench.bound(shipped)
    for size in fields(shipped):
        tried: dict[tuple, Sizes] = {}
        for sizes in [best, *choices(task, size.name, best)]:
            tried.setdefault(bench.bound(sizes), sizes)  # of those that come to the same, the first
        samples = bench.compare(tried, rounds)
        complete = [known for known in tried if len(samples[known]) == rounds]
        best = tried[least_ratio(samples, complete)]
    final = bench.bound(best)
    samples = bench.compare([base, final], 2 * rounds + 1)
    if final == base or ratio(samples, final, base) > 1 - LEAST_GAIN:
        best, final = shipped, base
    shipped_s, chosen_s = (statistics.median(samples[known]) for known in (base, final))
    return Found(task, shipped, best, shipped_s, chosen_s, bench.tried)


def tune(device: Device, tasks: Iterable[Task], rounds: int) -> Iterator[Found]:
    """The results, one after the other. The device has to profile."""
    for task in tasks:
        yield choose(device, task, rounds)
