"""Arrays that NumPy has saved: an .npz file of images and labels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from dpresnet.datasets.content import Content, Rows, held_out
from dpresnet.datasets.schema import Split
from dpresnet.errors import Refused

LAYOUTS = ("NHW", "NCHW", "NHWC")
COLOURS = (1, 3)  # channels that a layout is guessed from
SPLITS = ("train_images", "train_labels", "test_images", "test_labels")
WHOLE = ("images", "labels")


def read(source: Path, layout: str, test_fraction: float, class_names: tuple[str, ...]) -> Content:
    """Both splits of an .npz file, or a part of all its samples held out. ``layout`` "" is guessed where only one is possible,
    ``class_names`` () are the numbers. Refused for arrays that are missing or not what they should be.
    """
    arrays = _load(source)
    if set(SPLITS) <= set(arrays):
        if test_fraction:
            raise Refused(f"--test-fraction {test_fraction}: {source} has a test split already: leave the flag out")
        images, labels = ([arrays[name] for name in names] for names in (SPLITS[::2], SPLITS[1::2]))
    elif set(WHOLE) <= set(arrays):
        if not test_fraction:
            raise Refused(f"{source} has no test split: --test-fraction 0.1 holds out a tenth of every class")
        images, labels = [arrays["images"]], [arrays["labels"]]
    else:
        raise Refused(f"{source} has the arrays {', '.join(arrays) or 'none'}: save {', '.join(SPLITS)}, or images and labels")
    prefixes = ("train_", "test_") if len(images) == 2 else ("",)
    splits = [_split(*pair, layout, f"{source}: {prefix}") for *pair, prefix in zip(images, labels, prefixes, strict=True)]
    if splits[0].shape != splits[-1].shape:
        raise Refused(f"{source}: images to train have shape {splits[0].shape}, to test {splits[-1].shape}: make them alike")
    names = _names(source, splits, class_names)
    train, test = splits if len(splits) == 2 else _hold_out(splits[0], names, test_fraction)
    return Content(train, test, names, f"arrays of {source.resolve().name}")


def _load(source: Path) -> dict[str, np.ndarray]:
    """The arrays of the file that are of use. No pickle is read, and no more memory taken than the file announces."""
    if source.is_file() and not zipfile.is_zipfile(source):
        raise Refused(f"{source} is not an .npz file: save images and labels together by np.savez")
    try:
        with np.load(source, allow_pickle=False) as file:
            found = {name: file[name] for name in (*SPLITS, *WHOLE) if name in file}
    except (OSError, ValueError, EOFError, MemoryError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        # RuntimeError: of the zip file, where it is encrypted or compressed in a way that Python does not know
        raise Refused(f"{source} cannot be read as an .npz file: {' '.join(str(error).split())}") from None
    for name, array in found.items():
        if not isinstance(array, np.ndarray):
            raise Refused(f"{source}: {name} is not an array: save the arrays by np.savez")
    return found


def _split(images: np.ndarray, labels: np.ndarray, layout: str, where: str) -> Split:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise Refused(f"{where}images are {images.dtype} {images.shape}: save uint8 [N,H,W], [N,C,H,W] or [N,H,W,C], 0 to 255")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise Refused(f"{where}labels are {labels.dtype} {labels.shape}: save a whole number for each of {len(images)} images")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise Refused(f"{where}labels go from {labels.min()} to {labels.max()}: number the classes from 0")
    layout = layout or _guess(images.shape, where)
    if len(layout) != images.ndim:
        raise Refused(f"--layout {layout}: {where}images have {images.ndim} dimensions: give the layout they have")
    pixels = {"NHW": images[:, None], "NCHW": images}.get(layout)
    return Split(images.transpose(0, 3, 1, 2) if pixels is None else pixels, labels.astype(np.int32))


def _guess(shape: tuple[int, ...], where: str) -> str:
    if len(shape) == 3:
        return "NHW"
    possible = [name for name, channels in (("NCHW", shape[1]), ("NHWC", shape[3])) if channels in COLOURS]
    if len(possible) != 1:
        raise Refused(f"{where}images have shape {shape}, where channels may come first or last: give --layout NCHW or NHWC")
    return possible[0]


def _names(source: Path, splits: list[Split], given: tuple[str, ...]) -> tuple[str, ...]:
    """A name for each class; without given ones, all classes up to the highest have to be there."""
    highest = max(int(split.labels.max()) for split in splits)
    if given:
        if highest >= len(given):
            raise Refused(f"{source} has the label {highest}, --class-names gives {len(given)} names: give one for each class")
        return given
    there = set(np.unique(splits[0].labels).tolist())
    absent = [label for label in range(min(highest, len(there)) + 1) if label not in there]
    if absent:
        raise Refused(f"{source} has labels up to {highest}, but none to train is {absent[0]}: number the classes without "
                      "gaps, or give --class-names")  # fmt: skip
    return tuple(map(str, range(highest + 1)))


def _hold_out(split: Split, names: tuple[str, ...], fraction: float) -> tuple[Split, Split]:
    """Which samples are held out depends on what they are, not on where they stand."""
    test = held_out((image.tobytes() for image in split.images), split.labels.tolist(), names, fraction)
    parts = (np.flatnonzero(chosen) for chosen in (~test, test))
    train, test = (Split(Rows(split.images, rows), split.labels[rows]) for rows in parts)
    return train, test
