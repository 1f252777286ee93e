"""The shape of a convolution, for whoever computes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvShape:
    """x [images, in_channels, height, width] with weights [out_channels, in_channels / groups, kernel, kernel]."""

    images: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    groups: int
