"""MNIST and the sets that share its format: four IDX files, gzipped or not."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from dpresnet.datasets.content import Content
from dpresnet.datasets.schema import Split
from dpresnet.errors import Refused

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
MAGIC = {IMAGES: (0x0803, 3), LABELS: (0x0801, 1)}  # the type, unsigned bytes, and the number of dimensions
MOST_EXPANDED = 1032  # bytes that deflate can make of one
AGAIN = "get the files again"


@dataclass(frozen=True)
class Known:
    """What is known of a published set."""

    class_names: tuple[str, ...]
    source: str
    licence: str


KNOWN = {
    "mnist": Known(
        tuple("0123456789"),
        "Y. LeCun, C. Cortes and C. J. C. Burges, The MNIST database of handwritten digits",
        "not stated by the authors",
    ),
    "fashion-mnist": Known(
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        "H. Xiao, K. Rasul and R. Vollgraf (2017), Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
        "MIT",
    ),
    "kmnist": Known(
        tuple("おきすつなはまやれを"),
        "T. Clanuwat et al. (2018), KMNIST Dataset (created by CODH), adapted from Kuzushiji Dataset (created by NIJL and "
        "others), https://doi.org/10.20676/00000341",
        "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/",
    ),
}


def read(kind: str, source: Path) -> Content:
    """The set ``kind`` of `KNOWN` from the folder of its files. Refused for a file that is missing or not what it announces."""
    known = KNOWN[kind]
    if not source.is_dir():
        raise Refused(f"{source} is not a folder: give the one that holds train-{IMAGES} and three more, gzipped or not")
    train, test = (_split(source, stem, len(known.class_names)) for stem in ("train", "t10k"))
    if train.shape != test.shape:
        raise Refused(f"{source}: images to train are {train.shape[1:]}, those to test {test.shape[1:]}: {AGAIN}")
    return Content(train, test, known.class_names, known.source, known.licence)


def _split(source: Path, stem: str, classes: int) -> Split:
    paths = [_find(source, f"{stem}-{part}") for part in (IMAGES, LABELS)]
    images, labels = (_array(path, *MAGIC[part]) for path, part in zip(paths, (IMAGES, LABELS), strict=True))
    if len(images) != len(labels):
        raise Refused(f"{paths[1]} holds {len(labels)} labels, {paths[0].name} holds {len(images)} images: {AGAIN}")
    if labels.max() >= classes:
        sample = int(np.argmax(labels >= classes))
        raise Refused(f"{paths[1]}: sample {sample} has the label {labels[sample]}, there are {classes} classes: {AGAIN}")
    return Split(images[:, None], labels.astype(np.int32))


def _find(source: Path, name: str) -> Path:
    """The file in the first of the usual spellings."""
    stem, _, last = name.rpartition("-idx")
    spellings = [f"{spelling}{end}" for end in ("", ".gz") for spelling in (name, f"{stem}.idx{last}")]
    for spelling in spellings:
        if (source / spelling).is_file():
            return source / spelling
    raise Refused(f"{source} has none of {', '.join(spellings)}: give the folder that holds the four files of the set")


def _array(path: Path, magic: int, dimensions: int) -> np.ndarray:
    """The unsigned bytes of an IDX file. No more is read than its header announces, and one byte to see the end."""
    try:
        size = path.stat().st_size
        with (gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            header = file.read(4 + 4 * dimensions)
            shape = _shape(path, header, magic, dimensions)
            announced = prod(shape)
            if announced > size * (MOST_EXPANDED if path.suffix == ".gz" else 1):
                raise Refused(f"{path} announces {announced:,} bytes, more than its {size:,} can hold: {AGAIN}")
            content = file.read(announced + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"{path} cannot be read ({error}): {AGAIN}") from None
    if len(content) != announced:
        found = "more" if len(content) > announced else f"{len(content):,}"
        raise Refused(f"{path} announces {announced:,} bytes behind its header, and has {found}: {AGAIN}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _shape(path: Path, header: bytes, magic: int, dimensions: int) -> tuple[int, ...]:
    if len(header) != 4 + 4 * dimensions:
        raise Refused(f"{path} ends within its header: {AGAIN}")
    found, *shape = struct.unpack(f">{1 + dimensions}I", header)
    if found != magic:
        raise Refused(f"{path} begins with {found:#010x} instead of {magic:#010x}: it is no IDX file of {dimensions}-D bytes")
    if 0 in shape:
        raise Refused(f"{path} announces {' x '.join(map(str, shape))} values, none at all: {AGAIN}")
    return tuple(shape)
