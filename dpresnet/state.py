"""What a network is made of besides launches: its parameters and running statistics, by name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpresnet.device import BLOCK
from dpresnet.plan import Tensor, blocks_of

FLOAT = np.dtype(np.float32)


@dataclass(eq=False)
class Parameter:
    """A trained array: its logical shape, how it is initialised, and where its value, its gradient, what the
    optimizer keeps of it (``second_moment``: AdamW) and its moving average lie.
    """

    name: str
    shape: tuple[int, ...]
    init: str  # "kaiming", "uniform" (bound 1 / sqrt(fan in)), "ones" or "zeros"
    value: Tensor
    grad: Tensor
    momentum: Tensor
    second_moment: Tensor
    ema: Tensor
    fan_in: int = 0

    @property
    def size(self) -> int:
        """Number of trained values."""
        return int(np.prod(self.shape))


@dataclass(eq=False)
class Buffer:
    """A running statistic [channels] and its moving average."""

    name: str
    channels: int
    value: Tensor
    ema: Tensor


def flat(name: str, size: int, home: str) -> Tensor:
    """An fp32 array padded to whole channel blocks, so that vectors may touch its last lanes."""
    return Tensor(name, (blocks_of(size) * BLOCK,), FLOAT, home)


class State:
    """Parameters and running statistics by name, in the order of their declaration.

    Training and evaluation record the same network twice; both find the same arrays here.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, Parameter] = {}
        self.buffers: dict[str, Buffer] = {}

    def parameter(self, name: str, shape: tuple[int, ...], init: str, fan_in: int = 0) -> Parameter:
        """The parameter of this name; declared on first use."""
        if name not in self.parameters:
            size = int(np.prod(shape))
            homes = {"": "parameter", ".grad": "gradient", ".momentum": "momentum", ".second_moment": "second_moment",
                     ".ema": "ema_parameter"}  # fmt: skip
            tensors = [flat(f"{name}{suffix}", size, home) for suffix, home in homes.items()]
            self.parameters[name] = Parameter(name, shape, init, *tensors, fan_in)
        return self.parameters[name]

    def buffer(self, name: str, channels: int) -> Buffer:
        """The running statistic of this name; declared on first use."""
        if name not in self.buffers:
            tensors = flat(name, channels, "buffer"), flat(f"{name}.ema", channels, "ema_buffer")
            self.buffers[name] = Buffer(name, channels, *tensors)
        return self.buffers[name]
