"""Layers that read like a textbook and record what they do: each call appends its forward launches to a plan and leaves
behind how to go backward.

    x = net.conv("conv1", x, 64, kernel=3)
    x = net.relu(net.norm("bn1", x))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpresnet.device import BLOCK, Device
from dpresnet.ops import batchnorm, conv, linear, loss, pool, relu, residual, shortcut
from dpresnet.plan import CONTROL, Exchange, Plan, Tensor, blocks_of

FLOAT = np.dtype(np.float32)


@dataclass(eq=False)
class Parameter:
    """A trained array: its logical shape, how it is initialised, and where value, gradient and momentum lie."""

    name: str
    shape: tuple[int, ...]
    init: str  # "kaiming", "uniform" (bound 1 / sqrt(fan in)), "ones" or "zeros"
    value: Tensor
    grad: Tensor
    momentum: Tensor
    fan_in: int = 0

    @property
    def size(self) -> int:
        """Number of trained values."""
        return int(np.prod(self.shape))


@dataclass(eq=False)
class Buffer:
    """A running statistic [channels]."""

    name: str
    channels: int
    value: Tensor


@dataclass(eq=False)
class Packed:
    """A working copy of a parameter in the order its kernels read."""

    tensor: Tensor
    record: Callable[[Plan], None]


def flat(name: str, size: int, home: str) -> Tensor:
    """An fp32 array padded to whole channel blocks, so that vectors may touch its last lanes."""
    return Tensor(name, (blocks_of(size) * BLOCK,), FLOAT, home)


class State:
    """Parameters, running statistics and working copies by name, in the order of their declaration.

    Training and evaluation record the same network twice; both find the same arrays here.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, Parameter] = {}
        self.buffers: dict[str, Buffer] = {}
        self.packed: dict[str, Packed] = {}

    def parameter(self, name: str, shape: tuple[int, ...], init: str, fan_in: int = 0) -> Parameter:
        """The parameter of this name; declared on first use."""
        if name not in self.parameters:
            size = int(np.prod(shape))
            homes = [flat(f"{name}{suffix}", size, home) for suffix, home in
                     (("", "parameter"), (".grad", "gradient"), (".momentum", "momentum"))]  # fmt: skip
            self.parameters[name] = Parameter(name, shape, init, *homes, fan_in)
        return self.parameters[name]

    def buffer(self, name: str, channels: int) -> Buffer:
        """The running statistic of this name; declared on first use."""
        if name not in self.buffers:
            self.buffers[name] = Buffer(name, channels, flat(name, channels, "buffer"))
        return self.buffers[name]

    def working_copy(self, name: str, shape: tuple[int, ...], record: Callable[[Plan, Tensor], None]) -> Tensor:
        """A packed copy of a parameter, refreshed by ``record``; declared on first use."""
        if name not in self.packed:
            tensor = Tensor(name, shape, FLOAT, "packed")
            self.packed[name] = Packed(tensor, lambda plan: record(plan, tensor))
        return self.packed[name].tensor


class Recorder:
    """Records one network for one batch size: forward by calling its layers, then `loss` and `backward`.

    ``train`` chooses batch statistics and keeps what backward needs; otherwise running statistics are used.
    """

    def __init__(self, state: State, device: Device, precision: str, images: int, train: bool):
        self.state, self.images, self.train = state, images, train
        self.plan = Plan(device, precision)
        self.control = Tensor("control", (1,), CONTROL, "io")
        self.tape: list[Callable[[], None]] = []
        self.gradients: dict[Tensor, Tensor] = {}
        self._names: dict[str, int] = {}

    def unique(self, kind: str) -> str:
        """A name for a layer without parameters."""
        self._names[kind] = self._names.get(kind, 0) + 1
        return f"{kind}{self._names[kind]}"

    def input(self, channels: int, height: int, width: int) -> Tensor:
        """Normalised images, written before the plan is replayed."""
        tensor = self.plan.image("input", self.images, channels, height, width)
        tensor.home = "io"
        return tensor

    # Gradients of activations. A tensor used twice gets its gradients added, in the order of the tape.

    def give(self, x: Tensor, record: Callable[[Tensor], None]) -> None:
        """Records the launch that computes a gradient of ``x`` into a fresh tensor, and adds it to what ``x`` has."""
        fresh = Tensor(f"{x.name}.grad", x.shape, x.dtype, channels=x.channels)
        record(fresh)
        self.accumulate(x, fresh)

    def accumulate(self, x: Tensor, gradient: Tensor) -> None:
        """Adds a gradient to what ``x`` has already."""
        if x in self.gradients:
            total = Tensor(f"{x.name}.grad.sum", x.shape, x.dtype, channels=x.channels)
            residual.add(self.plan, total.name, self.gradients[x], gradient, total)
            gradient = total
        self.gradients[x] = gradient

    def backward(self) -> None:
        """Records the backward pass of everything recorded so far."""
        for step in reversed(self.tape):
            step()

    # Layers

    def conv(self, name: str, x: Tensor, channels: int, kernel: int, stride: int = 1, padding: int | None = None,
             groups: int = 1, zero: bool = False) -> Tensor:  # fmt: skip
        """Convolution without bias; ``padding`` defaults to half the kernel; ``zero`` initialises the weights with zeros."""
        padding = kernel // 2 if padding is None else padding
        shape = conv.conv_for(self.plan, x, channels, kernel, stride, padding, groups)
        weight = self.state.parameter(
            f"{name}.weight", (channels, x.channels // groups, kernel, kernel), "zeros" if zero else "kaiming"
        )

        def working_copy(transposed: bool) -> Tensor:
            label = f"{name}.{'transposed' if transposed else 'packed'}"
            return self.state.working_copy(
                label, shape.packed_shape(transposed),
                lambda plan, packed: conv.pack(plan, label, shape, weight.value, packed, transposed),
            )  # fmt: skip

        y = self.plan.image(name, x.images, channels, shape.out_height, shape.out_width)
        conv.forward(self.plan, name, shape, x, working_copy(False), y)

        def backward() -> None:
            dy = self.gradients.pop(y)
            conv.backward_weight(self.plan, weight.grad.name, shape, x, dy, weight.grad)
            if x.home == "work":  # images from the host need no gradient
                packed = working_copy(True)
                self.give(x, lambda dx: conv.backward_data(self.plan, f"{name}.dx", shape, dy, packed, dx))

        self.tape.append(backward)
        return y

    def norm(self, name: str, x: Tensor, zero: bool = False) -> Tensor:
        """Batch normalisation; ``zero`` initialises the weight with zeros instead of ones."""
        weight = self.state.parameter(f"{name}.weight", (x.channels,), "zeros" if zero else "ones")
        bias = self.state.parameter(f"{name}.bias", (x.channels,), "zeros")
        mean = self.state.buffer(f"{name}.running_mean", x.channels)
        var = self.state.buffer(f"{name}.running_var", x.channels)
        y = self.plan.image(name, x.images, x.channels, x.height, x.width)
        if not self.train:
            batchnorm.inference(self.plan, name, x, y, mean.value, var.value, weight.value, bias.value)
            return y
        pair, pixels = (2, x.blocks * BLOCK), x.height * x.width
        merged, moments, sums, means = (
            Tensor(f"{name}.{part}", pair, FLOAT, "statistic") for part in ("merged", "moments", "sums", "means")
        )
        batchnorm.statistics(self.plan, name, x, merged, self.control)
        self.plan.entries.append(Exchange(name, "statistics", merged, moments, pixels))
        batchnorm.apply(self.plan, name, x, y, moments, weight.value, bias.value)

        def backward() -> None:
            dy = self.gradients.pop(y)
            batchnorm.backward_reduce(self.plan, f"{name}.dx", dy, x, moments, sums, bias.grad, weight.grad)
            self.plan.entries.append(Exchange(name, "sums", sums, means, pixels))
            self.give(x, lambda dx: batchnorm.backward(
                self.plan, f"{name}.dx", dy, x, dx, moments, means, weight.value, self.control))  # fmt: skip

        self.tape.append(backward)
        return y

    def relu(self, x: Tensor) -> Tensor:
        """max(x, 0)."""
        name = f"{x.name}.relu"
        y = self.plan.image(name, x.images, x.channels, x.height, x.width)
        relu.forward(self.plan, name, x, y)

        def backward() -> None:
            dy = self.gradients.pop(y)
            self.give(x, lambda dx: relu.backward(self.plan, f"{name}.dx", dy, y, dx))

        self.tape.append(backward)
        return y

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b; both get the gradient of the sum."""
        name = self.unique("add")
        y = self.plan.image(name, a.images, a.channels, a.height, a.width)
        residual.add(self.plan, name, a, b, y)

        def backward() -> None:
            dy = self.gradients.pop(y)
            self.accumulate(a, dy)
            self.accumulate(b, dy)

        self.tape.append(backward)
        return y

    def subsample(self, x: Tensor, channels: int, stride: int) -> Tensor:
        """The shortcut without parameters: every stride-th pixel, zeros for new channels."""
        name = self.unique("shortcut")
        y = self.plan.image(name, x.images, channels, -(-x.height // stride), -(-x.width // stride))
        shortcut.forward(self.plan, name, x, y, stride)

        def backward() -> None:
            dy = self.gradients.pop(y)
            self.give(x, lambda dx: shortcut.backward(self.plan, f"{name}.dx", dy, dx, stride))

        self.tape.append(backward)
        return y

    def max_pool(self, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
        """Maxima of square windows."""
        name = self.unique("max_pool")
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (x.height, x.width))
        y = self.plan.image(name, x.images, x.channels, height, width)
        index = Tensor(f"{name}.index", y.shape, np.dtype(np.uint8))
        pool.max_forward(self.plan, name, x, y, index, kernel, stride, padding)

        def backward() -> None:
            dy = self.gradients.pop(y)
            self.give(x, lambda dx: pool.max_backward(self.plan, f"{name}.dx", dy, index, dx, kernel, stride, padding))

        self.tape.append(backward)
        return y

    def average_pool(self, x: Tensor) -> Tensor:
        """Mean over all pixels: [N, C, 1, 1]."""
        name = self.unique("average_pool")
        y = self.plan.image(name, x.images, x.channels, 1, 1)
        pool.average_forward(self.plan, name, x, y)

        def backward() -> None:
            dy = self.gradients.pop(y)
            self.give(x, lambda dx: pool.average_backward(self.plan, f"{name}.dx", dy, dx))

        self.tape.append(backward)
        return y

    def linear(self, name: str, x: Tensor, outputs: int) -> Tensor:
        """The classifier on pooled features; returns fp32 logits [N, padded outputs]."""
        weight = self.state.parameter(f"{name}.weight", (outputs, x.channels), "uniform", x.channels)
        bias = self.state.parameter(f"{name}.bias", (outputs,), "uniform", x.channels)
        packed = self.state.working_copy(
            f"{name}.packed", (outputs, x.blocks * BLOCK),
            lambda plan, packed: linear.pack(plan, f"{name}.packed", weight.value, packed, x.channels),
        )  # fmt: skip
        y = Tensor("logits", (x.images, blocks_of(outputs) * BLOCK), FLOAT, "io", channels=outputs)
        linear.forward(self.plan, name, x, packed, bias.value, y)

        def backward() -> None:
            dy = self.gradients.pop(y)
            linear.backward_weight(self.plan, weight.grad.name, dy, x, weight.grad, bias.grad, outputs)
            self.give(x, lambda dx: linear.backward_data(self.plan, f"{name}.dx", dy, packed, dx))

        self.tape.append(backward)
        return y

    def loss(self, logits: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax cross-entropy; returns labels [N] int32 (an input), loss [N] and correct [N]."""
        labels = Tensor("labels", (self.images,), np.dtype(np.int32), "io")
        losses, correct = (Tensor(name, (self.images,), FLOAT, "io") for name in ("loss", "correct"))
        gradient = Tensor("logits.grad", logits.shape, FLOAT)
        loss.softmax(self.plan, "loss", logits, labels, losses, correct, gradient, self.control, logits.channels, smoothing)
        self.gradients[logits] = gradient
        return labels, losses, correct
