"""Layers that read like a textbook and record what they do: each call appends its forward launches to a plan and leaves
behind how to go backward.

    x = net.conv("conv1", x, 64, kernel=3)
    x = net.relu(net.norm("bn1", x))

What a normalisation, an addition or ReLU returns is pending: the first layer that has to read it stores it, in one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpresnet.device import BLOCK, Device
from dpresnet.ops import batchnorm, conv, linear, loss, pool, residual, shortcut, winograd
from dpresnet.ops.batchnorm import Affine
from dpresnet.plan import CONTROL, Exchange, Plan, Tensor, blocks_of
from dpresnet.state import FLOAT, Parameter, State


@dataclass(eq=False)
class Norm:
    """A normalisation whose statistics are known, and which is applied together with what follows it."""

    name: str
    affine: Affine
    weight: Parameter
    bias: Parameter
    merged: Tensor  # what training exchanges for the moments
    applied: bool = False

    @property
    def x(self) -> Tensor:
        """What is normalised."""
        return self.affine.x

    def statistic(self, part: str) -> Tensor:
        """An array [2, C] that the replicas agree on."""
        return Tensor(f"{self.name}.{part}", self.affine.moments.shape, FLOAT, "statistic")


@dataclass(eq=False)
class Pending:
    """An activation that nothing computes yet: the sum of one or two branches, rectified if ``relu``.

    Branches that are to be normalised come first. `Recorder.memory` stores it, once.
    """

    branches: tuple[Norm | Tensor, ...]
    relu: bool = False
    stored: Tensor | None = None

    @property
    def name(self) -> str:
        """The name of the first branch."""
        return self.branches[0].name

    @property
    def source(self) -> Tensor:
        """A tensor of the same shape."""
        first = self.branches[0]
        return first.x if isinstance(first, Norm) else first

    @property
    def norms(self) -> list[Norm]:
        """The branches that are to be normalised."""
        return [branch for branch in self.branches if isinstance(branch, Norm)]

    @property
    def channels(self) -> int:
        """Logical number of channels."""
        return self.source.channels


Value = Tensor | Pending
Record = Callable[[Tensor, Tensor | None], None]  # records a gradient into a tensor, see `Recorder.give_later`


class Recorder:
    """Records one network for one batch size: forward by calling its layers, then `loss` and `backward`.

    ``train`` chooses batch statistics and keeps what backward needs; otherwise running statistics are used.

    Weights are copied into the order that the kernels read. In training that happens within the step, right before the copy
    is used: it is still in the cache then, and its memory serves the next layer. In evaluation it happens once, in the plan
    ``prepare``, for as many batches as follow.
    """

    def __init__(self, state: State, device: Device, precision: str, images: int, train: bool):
        self.state, self.images, self.train = state, images, train
        self.plan = Plan(device, precision)
        self.prepare = self.plan if train else Plan(device, precision)
        self.control = Tensor("control", (1,), CONTROL, "io")
        self.tape: list[Callable[[], None]] = []
        self.postponed: list[Callable[[], None]] = []  # see `meanwhile`
        self.gradients: dict[Tensor, list[Tensor | Record]] = {}  # the terms of each, see `terms`
        self.shared: set[Tensor] = set()  # terms of several gradients
        self.filled: Exchange | None = None  # see `advance`
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

    # Gradients of activations. A tensor used several times has one term per use, in the order of the tape.

    def give(self, x: Tensor, record: Callable[[Tensor], None]) -> None:
        """Records the launch that computes a gradient of ``x`` into a fresh tensor: one more term of what ``x`` gets."""
        self.add_term(x, self.recorded(x, lambda dx, z: record(dx)))

    def give_later(self, x: Tensor, record: Record) -> None:
        """One more term of the gradient of ``x``, by a launch that can do more, and so is recorded when the gradient is needed:
        ``record(dx, None)`` computes dx; ``record(dx, x)`` adds to the term in dx, where x is positive (see `joined`).
        """
        self.gradients[x] = [*(self.recorded(x, term) for term in self.gradients.get(x, [])), record]

    def recorded(self, x: Tensor, term: Tensor | Record) -> Tensor:
        """A term of the gradient of ``x`` as a tensor."""
        if isinstance(term, Tensor):
            return term
        fresh = self.like(x, f"{x.name}.grad")
        term(fresh, None)
        return fresh

    def add_term(self, x: Tensor, gradient: Tensor) -> None:
        """One more term of the gradient of ``x``."""
        self.gradients.setdefault(x, []).append(gradient)

    def joined(self, z: Tensor) -> Tensor | None:
        """The gradient of what was rectified to ``z``, if there are two terms and the launch of the last one can add the other:
        it need not be read again. Otherwise None.
        """
        match self.gradients[z]:
            case [Tensor() as first, last] if not isinstance(last, Tensor) and first not in self.shared:
                del self.gradients[z]
                last(first, z)
                return first
        return None

    def terms(self, x: Tensor, most: int) -> list[Tensor]:
        """The gradient of ``x`` as a sum of at most ``most`` tensors; what is too many is added up here."""
        terms = [self.recorded(x, term) for term in self.gradients.pop(x)]
        while len(terms) > most:
            total = self.like(x, f"{x.name}.grad.sum")
            residual.add(self.plan, total.name, terms[0], terms[1], total)
            terms = [total, *terms[2:]]
        return terms

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of ``x`` as one tensor."""
        return self.terms(x, 1)[0]

    def instead_of(self, term: Tensor) -> Tensor:
        """Where to store what is computed from a gradient, pixel by pixel: in its place, unless something else reads it too.

        Half the memory is touched then, and stays in the caches for longer.
        """
        return self.like(term, f"{term.name}.next") if term in self.shared else term

    @staticmethod
    def like(x: Tensor, name: str) -> Tensor:
        """An intermediate of the same shape."""
        return Tensor(name, x.shape, x.dtype, channels=x.channels)

    def backward(self) -> None:
        """Records the backward pass of everything recorded so far."""
        for step in reversed(self.tape):
            step()
        self.meanwhile()

    # Work that waits for nothing goes before an exchange, so that the device does not idle while replicas agree.

    def meanwhile(self) -> None:
        """Records what backward has postponed: gradients of weights, which only the optimizer waits for."""
        for record in self.postponed:
            record()
        self.postponed.clear()

    def advance(self, begin: int) -> None:
        """Moves the entries from number ``begin`` on, which need nothing but parameters, before the last exchange, unless that
        has got such work already.
        """
        entries = self.prepare.entries
        last = max((i for i, entry in enumerate(entries) if isinstance(entry, Exchange)), default=begin)
        if last < begin and entries[last] is not self.filled:
            self.filled = entries[last]
            entries[last:] = entries[begin:] + entries[last:begin]

    # Layers

    def conv(self, name: str, x: Value, channels: int, kernel: int, stride: int = 1, padding: int | None = None,
             groups: int = 1, zero: bool = False) -> Tensor:  # fmt: skip
        """Convolution without bias; ``padding`` defaults to half the kernel; ``zero`` initialises the weights with zeros."""
        x, padding = self.memory(x), kernel // 2 if padding is None else padding
        shape = conv.conv_for(self.plan, x, channels, kernel, stride, padding, groups)
        weight = self.state.parameter(
            f"{name}.weight", (channels, x.channels // groups, kernel, kernel), "zeros" if zero else "kaiming"
        )
        ops = winograd if winograd.suits(shape) else conv

        def packed(transposed: bool) -> Tensor:
            if self.train and ops is winograd and winograd.fresh_groups(shape, transposed):
                return weight.value
            copy = Tensor(f"{name}.{'transposed' if transposed else 'packed'}", ops.packed_shape(shape, transposed), FLOAT)
            begin = len(self.prepare.entries)
            ops.pack(self.prepare, copy.name, shape, weight.value, copy, transposed)
            self.advance(begin)
            return copy

        y = self.plan.image(name, x.images, channels, shape.out_height, shape.out_width)
        ops.forward(self.plan, name, shape, x, packed(False), y)

        def backward() -> None:
            dy = self.gradient(y)
            self.postponed.append(lambda: ops.backward_weight(self.plan, weight.grad.name, shape, x, dy, weight.grad))
            if x.home == "work":  # images from the host need no gradient
                turned = packed(True)
                self.give_later(x, lambda dx, z: ops.backward_data(self.plan, f"{name}.dx", shape, dy, turned, dx, z))

        self.tape.append(backward)
        return y

    def norm(self, name: str, x: Value, zero: bool = False) -> Pending:
        """Batch normalisation; ``zero`` initialises the weight with zeros instead of ones."""
        x = self.memory(x)
        weight = self.state.parameter(f"{name}.weight", (x.channels,), "zeros" if zero else "ones")
        bias = self.state.parameter(f"{name}.bias", (x.channels,), "zeros")
        mean = self.state.buffer(f"{name}.running_mean", x.channels)
        var = self.state.buffer(f"{name}.running_var", x.channels)
        moments = Tensor(f"{name}.moments", (2, x.blocks * BLOCK), FLOAT, "statistic" if self.train else "work")
        merged = Tensor(f"{name}.merged", moments.shape, FLOAT, "statistic")
        norm = Norm(name, Affine(x, moments, weight.value, bias.value), weight, bias, merged)
        if self.train:
            batchnorm.statistics(self.plan, name, x, merged, moments, self.control)
        else:
            batchnorm.running(self.prepare, f"{name}.running", x, mean.value, var.value, moments)
        return Pending((norm,))

    def relu(self, x: Pending) -> Pending:
        """max(x, 0) of an activation that is still pending and has a normalisation in it."""
        if not isinstance(x, Pending) or x.stored or not x.norms:
            raise ValueError(f"relu of {x.name}: only what a norm returns, or a sum with it, is rectified while it is pending")
        return Pending(x.branches, relu=True)

    def add(self, a: Value, b: Value) -> Pending:
        """a + b; both get the gradient of the sum."""
        branches = [self.branch(a), self.branch(b)]
        return Pending(tuple(sorted(branches, key=lambda branch: isinstance(branch, Tensor))))

    def branch(self, x: Value) -> Norm | Tensor:
        """A value as part of a sum: a normalisation that is not stored yet can be done there."""
        absorbed = isinstance(x, Pending) and not x.stored and not x.relu and len(x.branches) == 1
        return x.branches[0] if absorbed else self.memory(x)

    def memory(self, x: Value) -> Tensor:
        """The tensor of a value; computes a pending one where it is needed first."""
        if isinstance(x, Tensor):
            return x
        if not x.stored:
            x.stored = self.normalised(x) if x.norms else self.summed(x)
        return x.stored

    def summed(self, x: Pending) -> Tensor:
        """Stores the sum of two tensors."""
        z = self.like(x.source, self.unique("add"))
        residual.add(self.plan, z.name, *x.branches, z)

        def backward() -> None:
            dz = self.gradient(z)
            self.shared.add(dz)
            for branch in x.branches:
                self.add_term(branch, dz)

        self.tape.append(backward)
        return z

    def normalised(self, x: Pending) -> Tensor:
        """Stores one normalisation and what follows it, in one launch."""
        norms = x.norms
        for norm in norms:
            if norm.applied:
                raise ValueError(f"{norm.name} is used twice, with and without what follows it: normalise twice instead")
            norm.applied = True
        z = self.like(x.source, x.name)
        affines = [norm.affine for norm in norms]
        if self.train:
            self.exchange("statistics", norms, [norm.merged for norm in norms], [affine.moments for affine in affines])
        plain = [branch for branch in x.branches if isinstance(branch, Tensor)]
        batchnorm.apply(self.plan, z.name, affines[0], *([*affines[1:], *plain] or [None]), x.relu, z)
        self.tape.append(lambda: self.normalised_backward(z, norms, plain, x.relu))
        return z

    def exchange(self, kind: str, norms: list[Norm], sources: list[Tensor], targets: list[Tensor]) -> None:
        """Records that replicas agree, at once for all layers that the next launch normalises."""
        names, x = tuple(norm.name for norm in norms), norms[0].x
        self.plan.entries.append(Exchange(names, kind, tuple(sources), tuple(targets), x.height * x.width))

    def normalised_backward(self, z: Tensor, norms: list[Norm], plain: list[Tensor], relu: bool) -> None:
        """Gradients of everything that `normalised` put together."""
        affines, added = [norm.affine for norm in norms], len(norms) + len(plain) == 2
        given = self.joined(z) if relu else None
        terms, relu = ([given], False) if given else (self.terms(z, 2), relu)
        g = given or (self.instead_of(terms[-1]) if added else None)
        sums, means = ([norm.statistic(part) for norm in norms] for part in ("sums", "means"))
        partials = [Tensor(f"{total.name}.partial", (z.images, *total.shape), FLOAT) for total in sums]
        batchnorm.backward_reduce(self.plan, f"{z.name}.dx.reduce", terms, affines, relu, partials,
                                  z if added and not given else None, g if added else None)  # fmt: skip
        for norm, partial, total, mean in zip(norms, partials, sums, means, strict=True):
            batchnorm.add_images(self.plan, f"{norm.name}.dx.sum", partial, total, norm.bias.grad, norm.weight.grad, mean,
                                 self.control, z.height * z.width)  # fmt: skip
        self.meanwhile()
        self.exchange("sums", norms, sums, means)
        terms, relu = ([g], False) if added else (terms, relu)
        dxs = [self.like(norm.x, f"{norm.x.name}.grad") for norm in norms]
        if not plain:  # otherwise g is still read
            dxs[0] = self.instead_of(terms[-1])
        batchnorm.backward(self.plan, f"{z.name}.dx", terms, affines, relu, means, self.control, dxs)
        for norm, dx in zip(norms, dxs, strict=True):
            self.add_term(norm.x, dx)
        for tensor in plain:
            self.add_term(tensor, g)

    def subsample(self, x: Value, channels: int, stride: int) -> Tensor:
        """The shortcut without parameters: every stride-th pixel, zeros for new channels."""
        name, x = self.unique("shortcut"), self.memory(x)
        y = self.plan.image(name, x.images, channels, -(-x.height // stride), -(-x.width // stride))
        shortcut.forward(self.plan, name, x, y, stride)

        def backward() -> None:
            dy = self.gradient(y)
            self.give(x, lambda dx: shortcut.backward(self.plan, f"{name}.dx", dy, dx, stride))

        self.tape.append(backward)
        return y

    def max_pool(self, x: Value, kernel: int, stride: int, padding: int) -> Tensor:
        """Maxima of square windows."""
        name, x = self.unique("max_pool"), self.memory(x)
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (x.height, x.width))
        y = self.plan.image(name, x.images, x.channels, height, width)
        index = Tensor(f"{name}.index", y.shape, np.dtype(np.uint8))
        pool.max_forward(self.plan, name, x, y, index, kernel, stride, padding)

        def backward() -> None:
            dy = self.gradient(y)
            self.give(x, lambda dx: pool.max_backward(self.plan, f"{name}.dx", dy, index, dx, kernel, stride, padding))

        self.tape.append(backward)
        return y

    def average_pool(self, x: Value) -> Tensor:
        """Mean over all pixels: [N, C, 1, 1]."""
        name, x = self.unique("average_pool"), self.memory(x)
        y = self.plan.image(name, x.images, x.channels, 1, 1)
        pool.average_forward(self.plan, name, x, y)

        def backward() -> None:
            dy = self.gradient(y)
            self.give(x, lambda dx: pool.average_backward(self.plan, f"{name}.dx", dy, dx))

        self.tape.append(backward)
        return y

    def linear(self, name: str, x: Value, outputs: int) -> Tensor:
        """The classifier on pooled features; returns fp32 logits [N, padded outputs]."""
        x = self.memory(x)
        weight = self.state.parameter(f"{name}.weight", (outputs, x.channels), "uniform", x.channels)
        bias = self.state.parameter(f"{name}.bias", (outputs,), "uniform", x.channels)
        packed = Tensor(f"{name}.packed", (outputs, x.blocks * BLOCK), FLOAT)
        linear.pack(self.prepare, packed.name, weight.value, packed, x.channels)
        y = Tensor("logits", (x.images, blocks_of(outputs) * BLOCK), FLOAT, "io", channels=outputs)
        linear.forward(self.plan, name, x, packed, bias.value, y)

        def backward() -> None:
            dy = self.gradient(y)
            linear.backward_weight(self.plan, weight.grad.name, dy, x, weight.grad, bias.grad, outputs)
            self.give(x, lambda dx: linear.backward_data(self.plan, f"{name}.dx", dy, packed, dx))

        self.tape.append(backward)
        return y

    def loss(self, logits: Tensor, smoothing: float, views: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax cross-entropy, of two labels if ``views`` are given: labels [N] int32 (an input), loss [N], correct [N]."""
        labels = Tensor("labels", (self.images,), np.dtype(np.int32), "io")
        losses, correct = (Tensor(name, (self.images,), FLOAT, "io") for name in ("loss", "correct"))
        gradient = Tensor("logits.grad", logits.shape, FLOAT)
        outputs, classes = (losses, correct, gradient), logits.channels
        loss.softmax(self.plan, "loss", logits, labels, *outputs, self.control, classes, smoothing, views)
        self.gradients[logits] = [gradient]
        return labels, losses, correct
