"""``python -m dpresnet.predict CHECKPOINT IMAGE...``: what a trained network takes image files for, with its probabilities."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpresnet import environment
from dpresnet.datasets import images
from dpresnet.errors import Refused, exit_code
from dpresnet.evaluate import add_device


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = __doc__.split(": ", 1)[1]
    command = argparse.ArgumentParser(prog="python -m dpresnet.predict", description=text, allow_abbrev=False)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run's folder: its best.h5")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP of any size")
    command.add_argument("--top", type=int, default=3, metavar="N", help="classes for each image (3)")
    command.add_argument("--json", action="store_true", help="one JSON object for each image")
    add_device(command)
    return command


def pixels(paths: Sequence[Path], shape: tuple[int, int, int]) -> np.ndarray:
    """The files as uint8 [N, C, H, W] of ``shape``: their shorter sides scaled, their middles cut out, as when a data set is
    prepared with --size. Refused with the name of the first that cannot be used.
    """
    channels, height, width = shape
    if height != width:
        raise Refused(f"the network was trained on {height} x {width} pixels: only squares can be cut out of an image")
    if channels not in (1, 3):
        raise Refused(f"the network was trained on {channels} channels: image files have 1 or 3")
    images.pillow()
    found = []
    for path in paths:
        if images.suffix(path.name) not in images.FORMATS:
            raise Refused(f"{path} is no image by its name: give {', '.join(images.FORMATS)} files")
        try:
            found.append(images.decode(path.read_bytes(), path.name, images.Shaping(channels, height)))
        except OSError as error:
            raise Refused(f"{path} cannot be read: {error.strerror}") from None
        except images.Unusable as error:
            raise Refused(f"{path}: {error}") from None
    return np.stack(found)


def run(args: argparse.Namespace) -> None:
    """Prints the most probable classes of each image."""
    if args.top < 1:
        raise Refused(f"--top {args.top}: at least 1")
    environment.prepare(args.threads, 0, 1)
    from dpresnet.classifier import Classifier

    classifier = Classifier(args.checkpoint, args.batch, args.device)
    shares = classifier.probabilities(pixels(args.images, classifier.samples.shape))
    for path, row in zip(args.images, shares, strict=True):
        best = np.argsort(-row, kind="stable")[: args.top]
        named = {classifier.class_names[k]: round(float(row[k]), 6) for k in best}
        if args.json:
            print(json.dumps({"image": str(path), "classes": named}))
        else:
            print(f"{path}: " + ", ".join(f"{name} {value:.1%}" for name, value in named.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 78 for what was refused."""
    return exit_code(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
