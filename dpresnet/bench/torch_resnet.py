"""Every network of dpresnet, defined a second time in PyTorch: the peer in speed, and the oracle of the peers suite.

Nothing here is shared with the rest of the package, so a mistake has to be made twice to go unnoticed. Module names are
those of torchvision (`layer1.0.conv1`, `layer2.0.downsample.0`, `fc`), extended where torchvision has no such network:

* `stem="deep"` makes `conv1` a Sequential (`conv1.0` conv, `.1` norm, `.3` conv, `.4` norm, `.6` conv), as timm does;
* `block="v2"` has no `bn1` behind the stem; the norm in front of the pooling is called `norm`;
* the CIFAR family and the plain networks have three stages, `layer1` to `layer3`.

He 2015: "Deep residual learning for image recognition", arXiv:1512.03385. He 2016: "Identity mappings in deep residual
networks", arXiv:1603.05027. Xie 2017: "Aggregated residual transformations", arXiv:1611.05431.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Arch:
    """`width`: channels behind the stem; stage s has `width * 2**s` planes. `groups`, `group_width`: Xie 2017."""

    blocks: tuple[int, ...]
    bottleneck: bool = False
    width: int = 64
    groups: int = 1
    group_width: int = 64
    shortcuts: bool = True

    @property
    def expansion(self) -> int:
        return 4 if self.bottleneck else 1


ARCHS = {
    "resnet18": Arch((2, 2, 2, 2)),
    "resnet34": Arch((3, 4, 6, 3)),
    "resnet50": Arch((3, 4, 6, 3), bottleneck=True),
    "resnet101": Arch((3, 4, 23, 3), bottleneck=True),
    "resnet152": Arch((3, 8, 36, 3), bottleneck=True),
    "resnext50_32x4d": Arch((3, 4, 6, 3), bottleneck=True, groups=32, group_width=4),
    "resnext101_32x8d": Arch((3, 4, 23, 3), bottleneck=True, groups=32, group_width=8),
    "wide_resnet50_2": Arch((3, 4, 6, 3), bottleneck=True, group_width=128),
    # He 2015, section 4.2: 6n+2 layers, three stages of n basic blocks with 16, 32 and 64 channels.
    **{f"resnet{6 * n + 2}": Arch((n, n, n), width=16) for n in (3, 5, 7, 9, 18)},
    **{f"plain{6 * n + 2}": Arch((n, n, n), width=16, shortcuts=False) for n in (3, 5, 7, 9)},
}


def resnet(
    arch: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    stem: str = "imagenet",
    shortcut: str = "auto",
    block: str = "v1.5",
    zero_init_residual: bool = False,
) -> ResNet:
    """The network `arch`; `shortcut="auto"` is A (He 2015, section 4.2) for the CIFAR family and B for all others."""
    table = ARCHS[arch]
    if shortcut == "auto":
        shortcut = "A" if table.width == 16 else "B"
    net = ResNet(table, num_classes, in_channels, stem, shortcut, block)
    initialise(net, zero_init_residual)
    return net


class ResNet(nn.Module):
    """Images `[N, C, H, W]` to logits `[N, num_classes]`."""

    def __init__(self, arch: Arch, num_classes: int, in_channels: int, stem: str, shortcut: str, block: str):
        super().__init__()
        width, self.preactivated = arch.width, block == "v2"
        self.relu = nn.ReLU()
        self.conv1 = stem_conv(stem, in_channels, width)
        if not self.preactivated:
            self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = [f"layer{i}" for i in range(1, len(arch.blocks) + 1)]
        channels = width
        for i, (name, count) in enumerate(zip(self.stages, arch.blocks, strict=True)):
            planes, stride = width * 2**i, 1 if i == 0 else 2
            self.add_module(name, stage(arch, channels, planes, stride, count, shortcut, block))
            channels = planes * arch.expansion
        if self.preactivated:
            self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        if not self.preactivated:
            x = self.relu(self.bn1(x))
        x = self.pool(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        if self.preactivated:
            x = self.relu(self.norm(x))
        return self.fc(x.mean(dim=(2, 3)))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1; no bias, because a norm follows (or, in v2, precedes) it."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def stem_conv(stem: str, in_channels: int, width: int) -> nn.Module:
    if stem == "imagenet":
        return conv(in_channels, width, 7, stride=2)
    if stem == "cifar":
        return conv(in_channels, width, 3)
    half = width // 2
    return nn.Sequential(
        *(conv(in_channels, half, 3, stride=2), nn.BatchNorm2d(half), nn.ReLU()),
        *(conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU()),
        conv(half, width, 3),
    )


def stage(arch: Arch, channels: int, planes: int, stride: int, count: int, shortcut: str, block: str) -> nn.Sequential:
    """`count` blocks; the first one takes `channels` inputs and the stride."""
    kind = PreActivation if block == "v2" else PostActivation
    outputs = planes * arch.expansion
    blocks = []
    for i in range(count):
        inputs, step = (channels, stride) if i == 0 else (outputs, 1)
        convs = branch(arch, inputs, planes, step, block)
        blocks.append(kind(convs, shortcut_path(arch, inputs, outputs, step, shortcut, block)))
    return nn.Sequential(*blocks)


def branch(arch: Arch, inputs: int, planes: int, stride: int, block: str) -> list[nn.Conv2d]:
    """The convolutions of a block: 3x3, 3x3 (basic) or 1x1, 3x3, 1x1 (bottleneck; v1 strides in the first 1x1)."""
    if not arch.bottleneck:
        return [conv(inputs, planes, 3, stride), conv(planes, planes, 3)]
    inner = planes * arch.group_width // 64 * arch.groups
    first, second = (stride, 1) if block == "v1" else (1, stride)
    return [
        conv(inputs, inner, 1, first),
        conv(inner, inner, 3, second, arch.groups),
        conv(inner, planes * arch.expansion, 1),
    ]


def shortcut_path(arch: Arch, inputs: int, outputs: int, stride: int, shortcut: str, block: str) -> nn.Module | None:
    """He 2015, section 4.1: A pads new channels with zeros, B projects where the shape changes, C everywhere."""
    if not arch.shortcuts:
        return None
    changes = stride != 1 or inputs != outputs
    if shortcut == "C" or (shortcut == "B" and changes):
        # In v2 the projection reads an input that has just been normalised, and the next block normalises the sum.
        norm = [] if block == "v2" else [nn.BatchNorm2d(outputs)]
        return nn.Sequential(conv(inputs, outputs, 1, stride), *norm)
    return ZeroPadding(stride, outputs - inputs) if changes else nn.Identity()


class ZeroPadding(nn.Module):
    """Shortcut A: every `stride`-th pixel, then `extra` channels of zeros behind the existing ones. No parameters."""

    def __init__(self, stride: int, extra: int):
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class PostActivation(nn.Module):
    """v1 and v1.5: relu(shortcut(x) + norm(conv(... relu(norm(conv(x)))))). Without a shortcut: the plain network."""

    def __init__(self, convs: list[nn.Conv2d], downsample: nn.Module | None):
        super().__init__()
        self.depth, self.relu = len(convs), nn.ReLU()
        for i, layer in enumerate(convs, 1):
            self.add_module(f"conv{i}", layer)
            self.add_module(f"bn{i}", nn.BatchNorm2d(layer.out_channels))
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = self.relu(y)
        return self.relu(y if self.downsample is None else y + self.downsample(x))


class PreActivation(nn.Module):
    """v2: shortcut + conv(relu(norm(... conv(relu(norm(x)))))).

    A shortcut that is not the identity reads the activated input (He 2016, appendix, says so of projections; zero
    padding follows the same rule here); the identity passes x itself.
    """

    def __init__(self, convs: list[nn.Conv2d], downsample: nn.Module | None):
        super().__init__()
        self.depth, self.relu = len(convs), nn.ReLU()
        for i, layer in enumerate(convs, 1):
            self.add_module(f"bn{i}", nn.BatchNorm2d(layer.in_channels))
            self.add_module(f"conv{i}", layer)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        y = self.conv1(activated)
        for i in range(2, self.depth + 1):
            y = getattr(self, f"conv{i}")(self.relu(getattr(self, f"bn{i}")(y)))
        if self.downsample is None:
            return y
        return y + self.downsample(x if isinstance(self.downsample, nn.Identity) else activated)


def initialise(net: ResNet, zero_init_residual: bool) -> None:
    """Kaiming normal over the fan out; PyTorch's defaults (norm 1 and 0, uniform classifier) for the rest.

    `zero_init_residual` makes every block start as its shortcut: the last norm scales by 0 (Goyal 2017,
    arXiv:1706.02677, section 5.1). In v2 a convolution comes last; it is zeroed itself, since a zero norm in front of a
    ReLU would never learn.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for module in net.modules():
        if zero_init_residual and isinstance(module, PostActivation | PreActivation):
            last = "bn" if isinstance(module, PostActivation) else "conv"
            nn.init.zeros_(getattr(module, f"{last}{module.depth}").weight)
