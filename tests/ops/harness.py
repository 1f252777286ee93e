"""A bench for one plan: tensors go in and come out in logical layout, and memory that nobody should touch is watched.

Every byte of every arena is poison before the inputs are written. So an output element that a kernel leaves out is NaN
and fails its comparison, and so does one that reads memory nobody wrote. Afterwards all bytes outside of what the plan
writes (inputs, gaps between tensors, the ends of arenas) must be as they were, and padding lanes must be zero.

Inputs are drawn as the storage precision holds them. What is left between a kernel and `dpresnet.reference`, which gets
the same inputs, is the rounding of its sums and of its output; `tolerance` bounds that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from dpresnet import reference
from dpresnet.convolution import Conv
from dpresnet.device import ALIGNMENT, BLOCK, Arena, Device, choose_device, kernel_source
from dpresnet.plan import (
    CONTROL,
    Launch,
    Memory,
    Plan,
    Tensor,
    bind,
    blocks_of,
    image_shape,
    place_by_liveness,
    place_in_order,
)
from dpresnet.tiles import Sizes, Tuned

POISON = 0xFFFF  # in every two bytes: NaN as fp16 and as fp32, -1 as int, 255 as a byte
POISON_READ = 0x7FFF  # around inputs: NaN too, but another, so that it shows where it is copied to
EPS16, EPS32 = 2.0**-11, 2.0**-24  # half a unit in the last place of 1.0


PATHS = {"vector": 0, "narrow": 8, "scalar": 1}  # lanes: as many as there are, those of AVX2, or none, the path that GPUs take


@cache
def device_for(path: str) -> Device:
    """The device of this test run, computing with the lanes of a path, or fewer where it has fewer."""
    chosen = choose_device()
    return Device(chosen, vector=min(PATHS[path], Device(chosen).vector))


@dataclass(frozen=True)
class OfKernels(Tuned):
    """The same sizes for every launch of a kernel."""

    def find(self, conv: Conv, kernel: str, transposed: bool) -> Sizes | None:
        return self.entries.get(kernel)


def tuned_device(mode: Mode, sizes: dict[str, Sizes], kind: type[Device] = Device) -> Device:
    """A device of its own, on which these sizes were measured for every launch of the kernels named."""
    device = kind(choose_device(), vector=mode.device.vector)
    device.tuned = OfKernels(sizes)
    return device


@dataclass(frozen=True)
class Mode:
    """Storage precision and kernel path."""

    precision: str
    path: str

    def __str__(self) -> str:
        return f"{self.precision}-{self.path}"

    @property
    def device(self) -> Device:
        """Opened on first use, not while tests are collected."""
        return device_for(self.path)

    @property
    def storage(self) -> np.dtype:
        """Type of activations."""
        return np.dtype(np.float16 if self.precision == "fp16" else np.float32)


VECTOR_MODES = [Mode("fp32", "vector"), Mode("fp16", "vector"), Mode("fp16", "narrow")]
each_vector = pytest.mark.parametrize("mode", VECTOR_MODES, ids=str)  # for kernels that need vectors
each_mode = pytest.mark.parametrize("mode", [*VECTOR_MODES, Mode("fp32", "scalar"), Mode("fp16", "scalar")], ids=str)


def tolerance(dtype: np.dtype, length: int) -> float:
    """Largest error of a sum of ``length`` terms that is stored as ``dtype``, relative to the largest value.

    Roundings of an fp32 sum add up like a random walk; stored as fp16, all of them together vanish beside the last one.
    """
    return 4 * EPS16 if dtype == np.float16 else 4 * np.sqrt(length) * EPS32


def assert_close(actual: np.ndarray, expected: np.ndarray, allowed: float) -> None:
    """Same shape, and no error beyond ``allowed`` times the largest expected value; NaN is an error."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    if not expected.size:
        return
    error = np.abs(actual - expected)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    limit = allowed * np.abs(expected).max()
    place = tuple(int(i) for i in worst)
    assert error[worst] <= limit, f"{actual[worst]} instead of {expected[worst]} at {place}, allowed error {limit:.3g}"


def blocked(values: np.ndarray) -> np.ndarray:
    """[N, C, H, W] in the device's layout [N, blocks, H, W, BLOCK], zeros in the padding lanes."""
    images, channels, height, width = values.shape
    lanes = np.zeros((images, blocks_of(channels) * BLOCK, height, width), values.dtype)
    lanes[:, :channels] = values
    return lanes.reshape(images, -1, BLOCK, height, width).transpose(0, 1, 3, 4, 2)


def unblocked(stored: np.ndarray) -> np.ndarray:
    """The inverse of `blocked`, padding lanes included: [N, blocks * BLOCK, H, W]."""
    images, blocks, height, width, lanes = stored.shape
    return stored.transpose(0, 1, 4, 2, 3).reshape(images, blocks * lanes, height, width)


def without_padding(values: np.ndarray, channels: int, axis: int) -> np.ndarray:
    """The logical channels; all others must be exactly zero (as long as they are numbers, not positions)."""
    logical, padding = np.split(values, [channels], axis)
    assert values.dtype.kind != "f" or not padding.any(), "padding lanes must be zero"
    return logical


class Bench:
    """Declares the tensors of a plan, runs it once, and reads what it left. Values are float64 NCHW on this side."""

    def __init__(self, mode: Mode, device: Device | None = None):
        self.mode = mode
        self.plan = Plan(device or mode.device, mode.precision)
        self.memory = Memory({})
        self._random = np.random.default_rng(0)
        self._inputs: list[tuple[Tensor, np.ndarray]] = []
        self._outputs: list[Tensor] = []

    def draw(self, *shape: int, mean: float = 0.0, deviation: float = 1.0) -> np.ndarray:
        """Normally distributed values that the storage precision holds exactly."""
        return self._random.normal(mean, deviation, shape).astype(self.mode.storage).astype(np.float64)

    def image(self, values: np.ndarray, dtype: np.typing.DTypeLike = None) -> Tensor:
        """An input [N, C, H, W], in the storage precision unless ``dtype`` is given."""
        stored = blocked(np.asarray(values).astype(dtype or self.mode.storage))
        return self._input(stored, values.shape[1])

    def rows(self, values: np.ndarray) -> Tensor:
        """An fp32 input whose last axis is channels, filled up to whole blocks with zeros."""
        channels = values.shape[-1]
        padding = [(0, 0)] * (values.ndim - 1) + [(0, blocks_of(channels) * BLOCK - channels)]
        return self._input(np.pad(values, padding).astype(np.float32), channels)

    def array(self, values: np.ndarray, dtype: np.typing.DTypeLike = np.float32) -> Tensor:
        """An input as it is, without blocks."""
        return self._input(np.asarray(values).astype(dtype), 0)

    def control(self, **fields: float) -> Tensor:
        """What the host tells a replica; fields not given are 0."""
        values = np.zeros(1, CONTROL)
        for name, value in fields.items():
            values[name] = value
        return self._input(values, 0)

    def _input(self, stored: np.ndarray, channels: int) -> Tensor:
        tensor = Tensor(f"input {len(self._inputs)}", stored.shape, stored.dtype, "inputs", channels)
        self._inputs.append((tensor, stored))
        return tensor

    def out_image(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike = None) -> Tensor:
        """An output [N, C, H, W], in the storage precision unless ``dtype`` is given."""
        images, channels, height, width = shape
        return self._output(image_shape(images, channels, height, width), dtype or self.mode.storage, channels)

    def out_rows(self, *shape: int) -> Tensor:
        """An fp32 output whose last axis is channels."""
        return self._output((*shape[:-1], blocks_of(shape[-1]) * BLOCK), np.float32, shape[-1])

    def out_array(self, *shape: int, dtype: np.typing.DTypeLike = np.float32) -> Tensor:
        """An output without blocks."""
        return self._output(shape, dtype, 0)

    def _output(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike, channels: int) -> Tensor:
        tensor = Tensor(f"output {len(self._outputs)}", shape, np.dtype(dtype), "outputs", channels)
        self._outputs.append(tensor)
        return tensor

    def scratch(self, shape: tuple[int, ...]) -> Tensor:
        """An fp32 intermediate, such as a working copy of weights."""
        return Tensor("scratch", shape, np.dtype(np.float32))

    def run(self) -> None:
        """Places, allocates, poisons, runs; then checks what must not have changed."""
        written = {t for entry in self.plan if isinstance(entry, Launch) for t in entry.writes}
        assert written.issuperset(self._outputs), "a launch does not name an output among its writes"
        self._allocate()
        for tensor, stored in self._inputs:
            self.memory.write(tensor, stored)
        before = [bytes_of(arena).copy() for _, _, arena in self._arenas()]
        self._enqueue()
        for (home, chunk, arena), untouched in zip(self._arenas(), before, strict=True):
            after = bytes_of(arena)
            for tensor in written:
                if (tensor.home, tensor.place[0]) == (home, chunk):
                    place = slice(tensor.place[1], tensor.place[1] + tensor.nbytes)
                    untouched[place] = after[place]
            assert np.array_equal(after, untouched), f"a kernel wrote outside of its outputs, in {home}"

    def _allocate(self) -> None:
        sizes = {
            "work": place_by_liveness(self.plan, self.plan.device.cl.max_mem_alloc_size),
            "inputs": [place_in_order([tensor for tensor, _ in self._inputs])],
            "outputs": [place_in_order(self._outputs)],
        }
        self.memory = Memory({
            home: [self.plan.device.arena(nbytes + ALIGNMENT) for nbytes in chunks] for home, chunks in sizes.items()
        })
        for home, _, arena in self._arenas():
            arena.view(0, (arena.nbytes // 2,), np.uint16)[:] = POISON_READ if home == "inputs" else POISON
            arena.push(0, arena.nbytes)

    def _arenas(self) -> Iterator[tuple[str, int, Arena]]:
        return ((home, i, arena) for home, arenas in self.memory.homes.items() for i, arena in enumerate(arenas))

    def _enqueue(self) -> None:
        device, constants = self.plan.device, {}
        for entry, kernel in zip(self.plan, bind(self.plan, self.memory, constants), strict=True):
            device.enqueue(kernel, entry.size)
        device.finish()

    def stored(self, tensor: Tensor) -> np.ndarray:
        """A tensor as the device left it."""
        return self.memory.read(tensor).copy()

    def read(self, tensor: Tensor) -> np.ndarray:
        """A tensor in logical layout, its padding lanes checked."""
        values = self.stored(tensor)
        if not tensor.channels:
            return values
        if len(tensor.shape) == 5:
            return without_padding(unblocked(values), tensor.channels, 1)
        return without_padding(values, tensor.channels, -1)

    def assert_close(self, tensor: Tensor, expected: np.ndarray, length: int) -> None:
        """Within the tolerance of a sum of ``length`` terms."""
        assert_close(self.read(tensor), expected, tolerance(tensor.dtype, length))

    def assert_exact(self, tensor: Tensor, expected: np.ndarray) -> None:
        """Every value the one nearest to ``expected`` that its type holds."""
        with np.errstate(over="ignore"):  # fp16 overflows to infinity, on both sides
            np.testing.assert_array_equal(self.read(tensor), np.asarray(expected).astype(tensor.dtype))


def check_joined(bench: Bench, shape: Any, launch: Callable[..., Tensor]) -> None:
    """A gradient of the input of a convolution, as ``launch(bench, shape, dy, w, term, z)`` joins another term to it."""
    dy, w, term = bench.draw(*shape.y), bench.draw(*shape.w), bench.draw(*shape.x)
    z = reference.relu_forward(bench.draw(*shape.x))
    dx = launch(bench, shape, dy, w, term, z)
    both = term + reference.conv_backward_data(dy, w, shape.x, *shape.window)
    bench.assert_close(dx, reference.relu_backward(both, z), w[:, 0].size)


def bytes_of(arena: Arena) -> np.ndarray:
    """All of an arena, as the device left it."""
    arena.pull(0, arena.nbytes)
    return arena.view(0, (arena.nbytes,), np.uint8)


def struct_in(stem: str, name: str) -> np.dtype:
    """A struct of kernels/<stem>.cl as a numpy type: the names, types and order of its fields."""
    body = re.search(rf"typedef struct \{{([^}}]*)\}} {name};", kernel_source(stem)).group(1)
    declarations = re.sub(r"//.*", "", body).split(";")
    types = {"int": np.int32, "uint": np.uint32, "float": np.float32}
    fields = []
    for declaration in filter(None, map(str.strip, declarations)):
        kind, names = declaration.split(maxsplit=1)
        fields += [(field.strip(), types[kind]) for field in names.split(",")]
    return np.dtype(fields)
