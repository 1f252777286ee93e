"""The residual networks: ResNet (He et al. 2015, arXiv:1512.03385), pre-activation (He et al. 2016, arXiv:1603.05027),
ResNeXt (Xie et al. 2017, arXiv:1611.05431) and wide (Zagoruyko and Komodakis 2016, arXiv:1605.07146).

Names of parameters are those of the usual PyTorch implementation, so weights can be exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpresnet.errors import Refused
from dpresnet.nn import Recorder, Value
from dpresnet.plan import Tensor


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture: blocks per stage and their widths."""

    blocks: tuple[int, ...]
    bottleneck: bool
    width: int = 64  # channels of the stem and the first stage
    groups: int = 1
    group_width: int = 64  # channels of a group in the first stage's 3x3 convolution, per 64 of the stage
    shortcuts: bool = True

    @property
    def small(self) -> bool:
        """The family for CIFAR of section 4.2: three stages of 16, 32 and 64 channels."""
        return self.width == 16


def cifar(depth: int, shortcuts: bool = True) -> Family:
    """ResNet-(6n + 2) of section 4.2: n blocks of two 3x3 convolutions in each of three stages."""
    return Family(((depth - 2) // 6,) * 3, bottleneck=False, width=16, shortcuts=shortcuts)


ARCHITECTURES = {
    "resnet18": Family((2, 2, 2, 2), bottleneck=False),
    "resnet34": Family((3, 4, 6, 3), bottleneck=False),
    "resnet50": Family((3, 4, 6, 3), bottleneck=True),
    "resnet101": Family((3, 4, 23, 3), bottleneck=True),
    "resnet152": Family((3, 8, 36, 3), bottleneck=True),
    "resnext50_32x4d": Family((3, 4, 6, 3), bottleneck=True, groups=32, group_width=4),
    "resnext101_32x8d": Family((3, 4, 23, 3), bottleneck=True, groups=32, group_width=8),
    "wide_resnet50_2": Family((3, 4, 6, 3), bottleneck=True, group_width=128),
    **{f"resnet{depth}": cifar(depth) for depth in (20, 32, 44, 56, 110)},
    **{f"plain{depth}": cifar(depth, shortcuts=False) for depth in (20, 32, 44, 56)},
}


CHOICES = {"stem": ("imagenet", "cifar", "deep"), "shortcut": ("auto", "A", "B", "C"), "block": ("v1", "v1.5", "v2")}


@dataclass(frozen=True)
class Options:
    """Variants of an architecture; ``shortcut`` "auto" is A for the CIFAR family and B otherwise."""

    num_classes: int = 1000
    stem: str = "imagenet"  # 7x7/2 and max pool | "cifar": 3x3 | "deep": three 3x3 and max pool
    shortcut: str = "auto"  # A: zero padding, B: projection where the shape changes, C: projection everywhere
    block: str = "v1.5"  # v1: stride on the first 1x1, v1.5: on the 3x3, v2: pre-activation
    zero_init_residual: bool = False  # residual branches start at 0: the last norm, in v2 the last convolution

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise Refused(f"{name} {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.num_classes < 1:
            raise Refused(f"num_classes {self.num_classes}: at least 1")


def resolve_shortcut(arch: str, shortcut: str) -> str:
    """A, B or C for "auto"."""
    if shortcut != "auto":
        return shortcut
    return "A" if family_of(arch).small else "B"


def family_of(arch: str) -> Family:
    """The architecture of this name."""
    if arch not in ARCHITECTURES:
        raise Refused(f"unknown architecture {arch!r}: choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]


def resnet(net: Recorder, x: Tensor, arch: str, options: Options) -> Tensor:
    """Records the network on images ``x``; returns the logits [N, classes]."""
    family = family_of(arch)
    builder = Builder(net, family, options, resolve_shortcut(arch, options.shortcut))
    x = builder.stem(x)
    for stage, count in enumerate(family.blocks):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            x = builder.block(f"layer{stage + 1}.{index}", x, family.width << stage, stride)
    if options.block == "v2":
        x = net.relu(net.norm("norm", x))
    return net.linear("fc", net.average_pool(x), options.num_classes)


@dataclass(frozen=True)
class Builder:
    """The parts of a network, each recorded where it is called."""

    net: Recorder
    family: Family
    options: Options
    shortcut: str

    def stem(self, x: Tensor) -> Value:
        """From the image to the first stage."""
        net, width, deep = self.net, self.family.width, self.options.stem == "deep"
        large = self.options.stem != "cifar"
        if deep:
            half = width // 2
            x = net.relu(net.norm("conv1.1", net.conv("conv1.0", x, half, 3, stride=2)))
            x = net.relu(net.norm("conv1.4", net.conv("conv1.3", x, half, 3)))
        name, kernel, stride = ("conv1.6", 3, 1) if deep else ("conv1", 7, 2) if large else ("conv1", 3, 1)
        x = net.conv(name, x, width, kernel, stride=stride)
        if self.options.block != "v2":
            x = net.relu(net.norm("bn1", x))
        return net.max_pool(x, 3, stride=2, padding=1) if large else x

    def block(self, name: str, x: Value, width: int, stride: int) -> Value:
        """One residual block; ``width`` is that of its stage."""
        channels = width * (4 if self.family.bottleneck else 1)
        body = self.pre_activation if self.options.block == "v2" else self.post_activation
        return body(name, x, width, channels, stride)

    def convolutions(self, width: int, channels: int, stride: int) -> list[tuple[int, int, int, int]]:
        """(channels, kernel, stride, groups) of the convolutions of a block."""
        if not self.family.bottleneck:
            return [(width, 3, stride, 1), (width, 3, 1, 1)]
        inner = width * self.family.group_width // 64 * self.family.groups
        first, second = (stride, 1) if self.options.block == "v1" else (1, stride)
        return [(inner, 1, first, 1), (inner, 3, second, self.family.groups), (channels, 1, 1, 1)]

    def post_activation(self, name: str, x: Value, width: int, channels: int, stride: int) -> Value:
        """conv - norm - relu ..., the last relu after the addition (v1 and v1.5)."""
        net, convolutions = self.net, self.convolutions(width, channels, stride)
        y = x
        for i, (out, kernel, step, groups) in enumerate(convolutions, 1):
            last = i == len(convolutions)
            y = net.conv(f"{name}.conv{i}", y, out, kernel, stride=step, groups=groups)
            y = net.norm(f"{name}.bn{i}", y, zero=last and self.options.zero_init_residual)
            y = y if last else net.relu(y)
        if not self.family.shortcuts:
            return net.relu(y)
        if self.projects(x, channels, stride):
            x = net.norm(f"{name}.downsample.1", net.conv(f"{name}.downsample.0", x, channels, 1, stride=stride))
        elif x.channels != channels or stride != 1:
            x = net.subsample(x, channels, stride)
        return net.relu(net.add(y, x))

    def pre_activation(self, name: str, x: Value, width: int, channels: int, stride: int) -> Value:
        """norm - relu - conv ..., nothing after the addition (v2).

        A shortcut that changes the shape takes the activated input (He et al. 2016, appendix), the identity the raw one.
        """
        net, y, activated, convolutions = self.net, x, x, self.convolutions(width, channels, stride)
        for i, (out, kernel, step, groups) in enumerate(convolutions, 1):
            y = net.relu(net.norm(f"{name}.bn{i}", y))
            activated = y if i == 1 else activated
            zero = self.options.zero_init_residual and i == len(convolutions)
            y = net.conv(f"{name}.conv{i}", y, out, kernel, stride=step, groups=groups, zero=zero)
        if not self.family.shortcuts:
            return y
        if self.projects(x, channels, stride):
            x = net.conv(f"{name}.downsample.0", activated, channels, 1, stride=stride)
        elif x.channels != channels or stride != 1:
            x = net.subsample(activated, channels, stride)
        return net.add(y, x)

    def projects(self, x: Value, channels: int, stride: int) -> bool:
        """Whether the shortcut of a block has weights."""
        changes = x.channels != channels or stride != 1
        return self.shortcut == "C" or (self.shortcut == "B" and changes)
