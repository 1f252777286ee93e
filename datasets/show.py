"""``python -m dpresnet.datasets.show DATA -o sheet.png``: what training sees of a data set, as the device computes it.

A row per class with one of its training images: as it is stored, then as it looks in one epoch after the other. Takes the flags
of ``dpresnet.train`` that augment, so they can be tried before a run. Samples are mixed with the row below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpresnet import environment
from dpresnet.commandline import Parser, add_flags
from dpresnet.config import Config, validate
from dpresnet.errors import Refused, exit_code, require

if TYPE_CHECKING:
    from PIL.Image import Image

    from dpresnet.augment import Augmentation
    from dpresnet.data import Dataset

CELL, GAP, LETTER = 80, 4, 7  # pixels: an image at least, about, if it is small; around it; of a letter across
SHOWN = ("augmentation", "device")  # groups of flags of which those are taken that say what is seen
LEFT_OUT = ("threads", "bind", "debug", "dry_run")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = Parser(prog="python -m dpresnet.datasets.show", description=__doc__.split("\n\n")[0].split(": ", 1)[1],
                     argument_default=argparse.SUPPRESS, allow_abbrev=False)  # fmt: skip
    command.add_argument("dataset", metavar="DATA", help="digits, synthetic, or a data set file")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the picture, .png or .jpg")
    command.add_argument("--count", type=int, default=8, metavar="N", help="epochs shown, a column for each (default: 8)")
    command.add_argument("--epoch", type=int, default=0, metavar="N", help="the first of them (default: 0)")
    command.add_argument("--classes", type=int, default=10, metavar="N", help="rows (default: 10, or as many as there are)")
    command.add_argument("--seed", type=int, metavar="N", help="of the run (default: 0)")
    add_flags(command, [spec for spec in fields(Config) if spec.metadata["group"] in SHOWN and spec.name not in LEFT_OUT])
    return command


def first_of_each(labels: np.ndarray, classes: int) -> np.ndarray:
    """The index of the first sample of each of the first classes, as far as they have one: int64 [n]."""
    kinds, first = np.unique(labels, return_index=True)
    return first[kinds < classes]


def look(device: Any, dataset: Dataset, augmentation: Augmentation, images: np.ndarray, views: np.ndarray) -> np.ndarray:
    """What the kernel of training makes of stored images uint8 [n, C, H, W], no longer normalised: uint8 [n, C, *size]."""
    from dpresnet.ops import augment
    from dpresnet.plan import CONTROL, Memory, Plan, Tensor, bind, image_shape, place_in_order

    n, channels = images.shape[:2]
    plan, control = Plan(device, "fp32"), np.zeros(1, CONTROL)
    control["valid"] = n
    inputs = [Tensor("input", array.shape, array.dtype, "io") for array in (images, views, control)]
    y = Tensor("views", image_shape(n, channels, *augmentation.size), np.dtype(np.float32), "io", channels)
    augment.normalise(plan, "look", *inputs[:2], y, inputs[2], dataset.mean, dataset.std, **augmentation.features)
    memory, constants = Memory({"io": [device.arena(place_in_order([*inputs, y]))]}), {}
    for tensor, array in zip(inputs, (images, views, control), strict=True):
        memory.write(tensor, array)
    for launch, kernel in zip(plan, bind(plan, memory, constants), strict=True):
        device.enqueue(kernel, launch.size)
    seen = memory.read(y)[:, 0, :, :, :channels] * dataset.std + dataset.mean
    return np.rint(255 * seen).clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2)


def sheet(names: list[str], columns: list[np.ndarray]) -> Image:
    """A picture with a row for each name; columns are uint8 [n, C, H, W] of any sizes."""
    from PIL import Image, ImageDraw

    height, width = (max(column.shape[axis] for column in columns) for axis in (2, 3))
    zoom = max(1, round(CELL / max(height, width)))
    margin = 2 * GAP + LETTER * max(map(len, names))
    down, across = zoom * height + GAP, zoom * width + GAP
    picture = Image.new("RGB", (margin + across * len(columns), GAP + down * len(names)), "white")
    for row, name in enumerate(names):
        middle = GAP + row * down + zoom * height // 2
        ImageDraw.Draw(picture).text((GAP, middle), name, fill="black", anchor="lm")
        for number, column in enumerate(columns):
            pixels = colours(column[row]).repeat(zoom, axis=0).repeat(zoom, axis=1)
            left = margin + number * across + (zoom * width - pixels.shape[1]) // 2
            picture.paste(Image.fromarray(pixels), (left, middle - pixels.shape[0] // 2))
    return picture


def colours(image: np.ndarray) -> np.ndarray:
    """uint8 [C, H, W] -> [H, W, 3]: the first three channels, or the first one as grey."""
    return image[[0, 1, 2] if len(image) >= 3 else [0, 0, 0]].transpose(1, 2, 0)


def run(argv: Sequence[str] | None) -> str:
    """Draws and writes the sheet; says what is on it."""
    args = vars(parser().parse_args(argv))
    output, count, epoch, classes = (args.pop(name) for name in ("output", "count", "epoch", "classes"))
    for name, value, least in (("count", count, 1), ("epoch", epoch, 0), ("classes", classes, 1)):
        if value < least:
            raise Refused(f"--{name} {value} is out of range: it must be at least {least}")
    cfg = Config(**args)
    validate(cfg)
    require("PIL", "Pillow", f"-o {output}", "bench")
    environment.prepare(0, 0, 1)
    from dpresnet.data import load
    from dpresnet.device import Device, choose_device
    from dpresnet.setup import augmentation_of

    dataset = load(cfg.dataset, cfg.seed)
    augmentation = augmentation_of(cfg, dataset.shape)
    indices = first_of_each(dataset.train.labels, classes)
    device, images = Device(choose_device(cfg.device)), dataset.train.take(indices)
    columns = [look(device, dataset, augmentation, images, augmentation.drawn(cfg.seed, number, indices, images))
               for number in range(epoch, epoch + count)]  # fmt: skip
    names = [dataset.class_names[label] for label in dataset.train.labels[indices]]
    try:
        sheet(names, [images, *columns]).save(output)
    except (OSError, ValueError) as error:
        raise Refused(f"-o {output}: the picture cannot be written ({error}): choose another file, .png or .jpg") from None
    return f"{len(names)} images of {dataset.name}, as stored and in the epochs {epoch} to {epoch + count - 1} -> {output}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of what was refused, with one line on stderr."""
    return exit_code(lambda: print(run(argv)))


if __name__ == "__main__":
    sys.exit(main())
