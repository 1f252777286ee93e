"""What is measured: one network, batch and precision, the same for both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpresnet.errors import Refused
from dpresnet.shape import ConvShape


@dataclass(frozen=True)
class Workload:
    """``image`` is height and width in pixels; ``threads`` are CPU threads; ``infer`` is the forward pass of evaluation."""

    arch: str = "resnet18"
    stem: str = "cifar"
    image: int = 32
    batch: int = 64
    classes: int = 10
    precision: str = "fp32"
    device: str = "auto"
    threads: int = 1
    vector: int = 0
    infer: bool = False

    def __post_init__(self) -> None:
        for name in ("image", "batch", "classes", "threads"):
            if getattr(self, name) < 1:
                raise Refused(f"--{name} {getattr(self, name)}: at least 1")

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.arch}, {self.stem} stem, {self.image}x{self.image}, batch {self.batch}, {self.precision}, {threads}"

    @property
    def pass_name(self) -> str:
        """What is repeated."""
        return "evaluation forward" if self.infer else "training step"


@dataclass(frozen=True)
class Layer(ConvShape):
    """One convolution of a network. The ``first`` one computes no gradient of its input."""

    first: bool

    def __str__(self) -> str:
        window = f"{self.kernel}x{self.kernel}" + (f"/{self.stride}" if self.stride > 1 else "")
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{window} {self.in_channels} to {self.out_channels} of {self.height}x{self.width}{groups}"


DIRECTIONS = ("forward", "backward")  # of a layer: its output; the gradients of its weights and of its input


@dataclass(frozen=True)
class Sgd:
    """The optimizer of both sides."""

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4


Facts = dict[str, Any]  # what goes over a socket and into a JSON file
