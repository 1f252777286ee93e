"""Record once, replay every step: the flat list of everything that happens on a replica, and where its data lies.

Layers (`dpresnet.nn`) append entries while a network is recorded. A `Plan` is then placed (every intermediate gets its
range of one arena, by liveness) and bound (kernel objects with their arguments set, once per replica). Replaying is a loop
over the list, see `dpresnet.replicas`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod

import numpy as np
import pyopencl as cl

from dpresnet.device import ALIGNMENT, BLOCK, Arena, Device
from dpresnet.errors import Refused

MOST_ELEMENTS = 2**31 - 2**16  # of one tensor: indices are 32-bit in elementwise kernels

CONTROL = np.dtype(  # what the host tells a replica before each step; the struct of kernels/common.cl
    [("valid", np.int32), ("grad_scale", np.float32)]
)


@dataclass(eq=False)
class Tensor:
    """An array on the device, identified by itself.

    ``home`` names the arena: "work" for intermediates placed by liveness, else one that keeps its contents. ``channels``
    is the logical number of channels where the last axis is a block of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    home: str = "work"
    channels: int = 0
    place: tuple[int, int] | None = None  # (chunk of the home, byte offset)

    @property
    def size(self) -> int:
        """Elements, padding lanes included."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes, without alignment."""
        return self.size * self.dtype.itemsize

    @property
    def images(self) -> int:
        """N of a blocked image tensor [N][C / 16][H][W][16]."""
        return self.shape[0]

    @property
    def blocks(self) -> int:
        """Channel blocks of a blocked image tensor."""
        return self.shape[1]

    @property
    def height(self) -> int:
        """Rows of a blocked image tensor."""
        return self.shape[2]

    @property
    def width(self) -> int:
        """Columns of a blocked image tensor."""
        return self.shape[3]


def blocks_of(channels: int) -> int:
    """Number of channel blocks that hold this many channels."""
    return -(-channels // BLOCK)


def image_shape(images: int, channels: int, height: int, width: int) -> tuple[int, ...]:
    """Device shape of an image tensor."""
    return (images, blocks_of(channels), height, width, BLOCK)


@dataclass(frozen=True, eq=False)
class Constant:
    """A read-only table that is written once, when a plan is bound."""

    data: np.ndarray


@dataclass(frozen=True)
class Local:
    """Local memory of a work-group, in bytes."""

    nbytes: int


Argument = Tensor | Constant | Local | np.generic


@dataclass(eq=False)
class Launch:
    """A kernel with its arguments. ``size`` is the global size; ``flops`` counts multiplications and additions."""

    name: str
    stem: str
    verb: str
    size: tuple[int, ...]
    args: tuple[Argument, ...]
    writes: tuple[Tensor, ...]
    defines: tuple[tuple[str, int], ...] = ()
    flops: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor it touches."""
        return [argument for argument in self.args if isinstance(argument, Tensor)]

    @cached_property
    def statistics(self) -> list[Tensor]:
        """Those of the written tensors that replicas exchange."""
        return [tensor for tensor in self.writes if tensor.home == "statistic"]

    def __str__(self) -> str:
        out = ", ".join(f"{t.name} {list(t.shape)} {t.dtype} {t.nbytes / 1024:.1f} KiB" for t in self.writes)
        work = f"  {self.flops / 1e6:.1f} MFLOP" if self.flops else ""
        return f"{self.name:32s} {self.stem + '_' + self.verb:26s} -> {out}{work}"


@dataclass(eq=False)
class Exchange:
    """Replicas must agree before the next launch, on the statistics of one or more layers at a time.

    ``kind`` "statistics": merge (count, mean, M2) of each of ``sources`` [2][C] into its target [2][C] = mean, 1 / deviation,
    and keep the merged mean and M2 for the running statistics of the layer, one of ``names``. ``kind`` "sums": add each source
    over the replicas, divide by the number of values, into its target. ``pixels`` is the number of values per image and
    channel, the same for all.

    On a device with double precision the launches that write ``sources`` have put into ``targets`` what a replica comes to that
    agrees with nobody else.
    """

    names: tuple[str, ...]
    kind: str
    sources: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    pixels: int

    @property
    def name(self) -> str:
        """The layers."""
        return " and ".join(self.names)

    @cached_property
    def columns(self) -> list[slice]:
        """Where the channels of each layer lie when the layers stand side by side."""
        ends = np.cumsum([source.shape[1] for source in self.sources]).tolist()
        return [slice(begin, end) for begin, end in pairwise([0, *ends])]

    @property
    def size(self) -> int:
        """Values that a replica hands over."""
        return sum(source.size for source in self.sources)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor it touches."""
        return [*self.sources, *self.targets]

    @property
    def writes(self) -> tuple[Tensor, ...]:
        """What it changes."""
        return self.targets

    def __str__(self) -> str:
        nbytes = sum(source.nbytes for source in self.sources)
        return f"{self.name:32s} exchange {self.kind}: {nbytes} bytes per replica"


@dataclass(eq=False)
class Ready:
    """The last gradient of this bucket has been enqueued."""

    bucket: int
    gradients: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor it touches."""
        return self.gradients

    @property
    def writes(self) -> tuple[Tensor, ...]:
        """Nothing: it only marks."""
        return ()

    def __str__(self) -> str:
        nbytes = sum(t.nbytes for t in self.gradients)
        return f"{'bucket ' + str(self.bucket):32s} ready: {len(self.gradients)} gradients, {nbytes / 2**20:.2f} MiB"


Entry = Launch | Exchange | Ready


class Plan:
    """A list of entries for one device, in the order they are enqueued."""

    def __init__(self, device: Device, precision: str):
        self.device, self.half = device, precision == "fp16"
        self.storage = np.dtype(np.float16 if self.half else np.float32)
        self.entries: list[Entry] = []

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __str__(self) -> str:
        return "\n".join(f"{i:4d}  {entry}" for i, entry in enumerate(self.entries))

    def image(self, name: str, images: int, channels: int, height: int, width: int) -> Tensor:
        """Declares an intermediate image tensor in the storage precision."""
        tensor = Tensor(name, image_shape(images, channels, height, width), self.storage, channels=channels)
        if tensor.size >= MOST_ELEMENTS:
            raise Refused(f"--batch {images}: {name} would have {tensor.size:,} elements, kernels count to {MOST_ELEMENTS:,}: "
                          "use a smaller --batch or --image")  # fmt: skip
        return tensor

    def launch(
        self,
        name: str,
        kernel: str,
        size: tuple[int, ...],
        args: list[Argument],
        writes: list[Tensor],
        flops: int = 0,
        **defines: int,
    ) -> None:
        """Appends a launch of ``kernel`` = "<stem>_<verb>"; HALF and VEC are defined for every kernel."""
        stem, verb = kernel.split("_", 1)
        defines = {"HALF": int(self.half), "VEC": self.device.vector, **defines}
        items = tuple(sorted(defines.items()))
        self.entries.append(Launch(name, stem, verb, size, tuple(args), tuple(writes), items, flops))

    def elementwise(self, name: str, kernel: str, elements: int, args: list[Argument], writes: list[Tensor],
                    **defines: int) -> None:  # fmt: skip
        """Appends a launch over a flat range of ``elements`` (a multiple of BLOCK), passed as the first argument."""
        items = 64 if self.device.host_memory else 1
        size = (-(-elements // (items * self.device.vector)),)
        self.launch(name, kernel, size, [np.int32(elements), *args], writes, ITEMS=items, **defines)

    @property
    def flops(self) -> int:
        """Multiplications and additions of one replay on one replica."""
        return sum(entry.flops for entry in self.entries if isinstance(entry, Launch))

    def tensors(self) -> list[Tensor]:
        """Every tensor of the plan, once, in the order of first use."""
        return list({id(t): t for entry in self.entries for t in entry.tensors}.values())


def insert_ready(plan: Plan, buckets: list[list[Tensor]]) -> None:
    """Puts a Ready after the entry that writes the last gradient of each bucket, in the order of the buckets."""
    written = {t: i for i, e in enumerate(plan) if isinstance(e, Launch) for t in e.writes if t.home == "gradient"}
    last = -1
    ready: dict[int, list[Ready]] = {}
    for number, tensors in enumerate(buckets):
        last = max([last, *(written[t] for t in tensors)])
        ready.setdefault(last, []).append(Ready(number, tensors))
    plan.entries = [part for i, entry in enumerate(plan.entries) for part in (entry, *ready.get(i, []))]


def lifetimes(plan: Plan) -> dict[Tensor, tuple[int, int]]:
    """First and last entry that touches each intermediate."""
    spans: dict[Tensor, tuple[int, int]] = {}
    for i, entry in enumerate(plan):
        for tensor in entry.tensors:
            if tensor.home == "work":
                spans[tensor] = (spans.get(tensor, (i, i))[0], i)
    return spans


def aligned(nbytes: int) -> int:
    """Rounds up to what a sub-buffer may start at."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def place_by_liveness(plan: Plan, chunk_bytes: int, prepare: Plan | None = None) -> list[int]:
    """Gives every intermediate its (chunk, offset); returns the bytes of each chunk.

    What ``prepare`` writes is kept throughout, for any number of replays of the plan.

    Largest first, each at the lowest address that is free for its whole lifetime (greedy by size, Pisarchyk and Lee 2020,
    arXiv:2001.03288). A chunk is an allocation of at most ``chunk_bytes``, the device's limit.
    """
    spans = lifetimes(plan)
    spans |= {tensor: (0, len(plan.entries)) for tensor in (lifetimes(prepare) if prepare else ())}
    placed: list[list[Tensor]] = []
    for tensor in sorted(spans, key=lambda t: -t.nbytes):
        need, (first, last) = aligned(tensor.nbytes), spans[tensor]
        for chunk in range(len(placed) + 1):
            if chunk == len(placed):
                placed.append([])
            rivals = [t for t in placed[chunk] if spans[t][0] <= last and first <= spans[t][1]]
            offset = lowest_gap([(t.place[1], aligned(t.nbytes)) for t in rivals], need)
            if offset + need <= chunk_bytes or not placed[chunk]:
                tensor.place = (chunk, offset)
                placed[chunk].append(tensor)
                break
    return [max(t.place[1] + aligned(t.nbytes) for t in tensors) for tensors in placed]


def lowest_gap(taken: list[tuple[int, int]], need: int) -> int:
    """Lowest offset at which ``need`` bytes fit between the taken (offset, bytes) ranges."""
    offset = 0
    for start, nbytes in sorted(taken):
        if start - offset >= need:
            break
        offset = max(offset, start + nbytes)
    return offset


def place_in_order(tensors: list[Tensor]) -> int:
    """Lays tensors one after the other in one chunk; returns its bytes."""
    offset = 0
    for tensor in tensors:
        tensor.place = (0, offset)
        offset += aligned(tensor.nbytes)
    return offset


@dataclass
class Memory:
    """The arenas behind the tensors, for one replica (those of all replicas share the homes that replicas share)."""

    homes: dict[str, list[Arena]]
    # kept: tensors and arenas stay where they are
    _views: dict[Tensor, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def arena(self, tensor: Tensor) -> Arena:
        """The arena a tensor lies in."""
        return self.homes[tensor.home][tensor.place[0]]

    def buffer(self, tensor: Tensor) -> cl.Buffer:
        """Device side of a tensor."""
        return self.arena(tensor).buffer(tensor.place[1], tensor.nbytes)

    def view(self, tensor: Tensor) -> np.ndarray:
        """Host side of a tensor, without waiting or copying."""
        if tensor not in self._views:
            self._views[tensor] = self.arena(tensor).view(tensor.place[1], tensor.shape, tensor.dtype)
        return self._views[tensor]

    def fetch(self, tensor: Tensor) -> np.ndarray:
        """Host side of a tensor whose launch is known to be done: where device and host share memory nothing waits."""
        return self.view(tensor) if self.arena(tensor).device.host_memory else self.read(tensor)

    def read(self, tensor: Tensor) -> np.ndarray:
        """Waits for the device and returns the host side of a tensor."""
        self.arena(tensor).pull(tensor.place[1], tensor.nbytes)
        return self.view(tensor)

    def write(self, tensor: Tensor, values: np.ndarray | float) -> None:
        """Fills a tensor from the host."""
        self.view(tensor)[...] = values
        self.push(tensor)

    def push(self, tensor: Tensor) -> None:
        """Makes the device side of a tensor current."""
        self.arena(tensor).push(tensor.place[1], tensor.nbytes)


def bind(plan: Plan, memory: Memory, constants: dict[int, cl.Buffer]) -> list[cl.Kernel | None]:
    """Kernel objects with all arguments set, one per entry (None for entries that launch nothing).

    ``constants`` is shared by the replicas of a process: each table is uploaded once.
    """
    return [bind_launch(plan.device, e, memory, constants) if isinstance(e, Launch) else None for e in plan]


def bind_launch(device: Device, launch: Launch, memory: Memory, constants: dict[int, cl.Buffer]) -> cl.Kernel:
    """One kernel object with its arguments set."""
    kernel = cl.Kernel(device.program(launch.stem, **dict(launch.defines)), f"{launch.stem}_{launch.verb}")
    for index, argument in enumerate(launch.args):
        kernel.set_arg(index, device_argument(device, argument, memory, constants))
    return kernel


def device_argument(device: Device, argument: Argument, memory: Memory, constants: dict[int, cl.Buffer]) -> object:
    """What OpenCL takes for an argument of a launch."""
    if isinstance(argument, Tensor):
        return memory.buffer(argument)
    if isinstance(argument, Local):
        return cl.LocalMemory(argument.nbytes)
    if not isinstance(argument, Constant):
        return argument
    if id(argument) not in constants:
        flags = cl.mem_flags.READ_ONLY | cl.mem_flags.COPY_HOST_PTR
        constants[id(argument)] = cl.Buffer(device.context, flags, hostbuf=np.ascontiguousarray(argument.data))
    return constants[id(argument)]
