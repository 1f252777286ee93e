"""Networks with weights and images on which two correct implementations must agree.

The gradient of a ReLU network jumps where a ReLU's input crosses zero (and a max pool's where two inputs are equal).
Of ten million ReLU inputs some always lie within a rounding error of zero; correct implementations then differ by
percents. So weights are drawn such that few inputs lie near zero, and images until none lies within MARGIN of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dpresnet.bench import torch_resnet

MARGIN = 2.0**-18
"""64 roundings (2^-24 each) of a number near 1, which is the size of the ReLU inputs here."""

Arrays = dict[str, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray]
"""images float32 [N, C, H, W], labels int64 [N]"""


@dataclass(frozen=True)
class Case:
    """A network and the size of its input. `ordinary`: weights as early in a training, see `draw_weights`."""

    arch: str
    image: tuple[int, int, int] = (3, 32, 32)
    batch: int = 8
    classes: int = 10
    options: dict[str, str | bool] = field(default_factory=dict)
    ordinary: bool = False

    def __str__(self) -> str:
        options = [f"{key}-{value}" for key, value in self.options.items()]
        size = "x".join(map(str, (self.batch, *self.image)))
        return "-".join([self.arch, *options, size, *["ordinary"] * self.ordinary])

    def torch(self, dtype: torch.dtype) -> torch_resnet.ResNet:
        """The PyTorch network."""
        net = torch_resnet.resnet(self.arch, num_classes=self.classes, in_channels=self.image[0], **self.options)
        return net.to(dtype)


@dataclass(frozen=True)
class Problem:
    """Weights and running statistics by name (float32), and a batch."""

    weights: Arrays
    images: np.ndarray
    labels: np.ndarray


def pose(case: Case, clear: bool = True) -> Problem:
    """The problem of a case, always the same; `clear`: no ReLU is undecided."""
    rng = np.random.default_rng(0)
    net = case.torch(torch.float64)
    load(net, draw_weights(net, rng, case.ordinary))
    # The running statistics of some other batch, as a trained network has: the eval logits then have an ordinary size.
    train_forward(net, draw_images(case, rng), momentum=1.0)
    weights = {name: value.numpy().astype(np.float32) for name, value in state(net).items()}
    load(net, weights)
    images, labels = draw_clear_batch(case, net, rng) if clear else (draw_images(case, rng), draw_labels(case, rng))
    return Problem(weights, images, labels)


def draw_weights(net: nn.Module, rng: np.random.Generator, ordinary: bool) -> Arrays:
    """Kaiming convolutions, and norms that nearly always switch every third channel off and the others on.

    A norm's output is weight * (a number of mean 0, deviation 1) + bias: with weight 0.35 and bias 1 or -1 it crosses
    zero at one pixel in 500. The same channels are off in every layer, or a residual sum would switch them on again.
    Ordinary norms (weight near 1, bias near 0) cross zero everywhere and suit networks with few activations only.
    """
    drawn = {}
    for name, value in state(net).items():
        shape, kind = tuple(value.shape), name.rpartition(".")[2]
        if len(shape) > 1:
            fan = shape[0] * value[0, 0].numel() if len(shape) == 4 else 2 * shape[1]
            drawn[name] = rng.normal(0, np.sqrt(2 / fan), shape)
        elif kind == "weight":
            drawn[name] = rng.uniform(0.5, 1.5, shape) if ordinary else rng.uniform(0.3, 0.4, shape)
        elif kind == "bias":
            switched = np.where(np.arange(shape[0]) % 3 == 2, -1.0, 1.0)
            drawn[name] = rng.uniform(-0.5, 0.5, shape) if ordinary or name == "fc.bias" else switched
        else:
            drawn[name] = np.full(shape, 1.0 if kind == "running_var" else 0.0)
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def draw_images(case: Case, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((case.batch, *case.image), dtype=np.float32)


def draw_labels(case: Case, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, case.classes, case.batch)


class Undecided(Exception):
    """A ReLU or a max pool that rounding might turn the other way."""


def draw_clear_batch(case: Case, net: torch_resnet.ResNet, rng: np.random.Generator) -> Batch:
    """Images for which nothing in the float64 `net` is undecided, in train mode. The net is not changed."""
    for _ in range(300):
        images = draw_images(case, rng)
        with suppress(Undecided), undecided_raises(net):
            train_forward(net, images, momentum=0.0)
            return images, draw_labels(case, rng)
    raise AssertionError(f"{case}: too many ReLU inputs near zero; use fewer activations, or weights further from it")


@contextmanager
def undecided_raises(net: nn.Module) -> Iterator[None]:
    """At the first layer where it happens: a forward pass that is of no use ends there."""

    def look(module: nn.Module, args: tuple[Tensor]) -> None:
        if margin(module, args[0]) <= MARGIN:
            raise Undecided

    deciding = [module for module in net.modules() if isinstance(module, nn.ReLU | nn.MaxPool2d)]
    hooks = [module.register_forward_pre_hook(look) for module in deciding]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def margin(module: nn.Module, x: Tensor) -> float:
    """The least distance of a ReLU's input from zero, or of the largest two in a 3x3 window of stride 2.

    An exact 0 is no accident: an earlier ReLU or a zeroed norm made it; it is 0 in fp32 too, and stops the gradient.
    """
    if isinstance(module, nn.ReLU):
        return x[x != 0].abs().min().item()
    padded = nn.functional.pad(x, (1, 1, 1, 1), value=-torch.inf)
    windows = padded.unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2)
    first, second = windows.topk(2).values.unbind(-1)
    return (first - second)[first != 0].min().item()


def train_forward(net: torch_resnet.ResNet, images: np.ndarray, momentum: float) -> None:
    """One forward pass in train mode; the running statistics become (1 - momentum) * running + momentum * batch."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = norms[0].momentum
    for norm in norms:
        norm.momentum = momentum
    try:
        with torch.no_grad():
            net.train()(tensor(net, images))
    finally:
        for norm in norms:
            norm.momentum = usual


def state(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics by name, without PyTorch's batch counters."""
    return {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}


def load(net: nn.Module, weights: Arrays) -> None:
    """`weights` into the net, in the net's own precision."""
    for name, value in state(net).items():
        value.copy_(torch.from_numpy(weights[name]))


def tensor(net: torch_resnet.ResNet, images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).to(net.fc.weight.dtype)
