"""CIFAR-10 and CIFAR-100 as they are published: the archive or its folder, the binary or the Python version."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpresnet.datasets import pickles
from dpresnet.datasets.content import Content
from dpresnet.datasets.schema import Split
from dpresnet.errors import Refused

SHAPE, PIXELS = (3, 32, 32), 3072
MOST_NAMES = 1 << 16  # bytes of a file with the names of classes
MOST_BESIDES = 1 << 22  # bytes of an archive for what is no sample
PER_SAMPLE = 128  # bytes at most that a pickle has for a sample besides its pixels: labels and the name of a file
SOURCE = "A. Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images, https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Published:
    """What a set consists of: ``batch`` samples in each file of ``train`` and ``test``, whose names end in .bin in the binary
    version; of the ``labels`` before each image in it the last counts, which the pickles have under ``key``. ``meta`` and
    ``names`` are the files with the names of classes, and the key of these in the former.
    """

    classes: int
    train: tuple[str, ...]
    train_batch: int
    test: str
    test_batch: int
    labels: int
    key: str
    meta: str
    names_key: str
    names: str

    @property
    def samples(self) -> dict[str, int]:
        """The number of samples in each file."""
        return dict.fromkeys(self.train, self.train_batch) | {self.test: self.test_batch}


KNOWN = {
    "cifar10": Published(10, tuple(f"data_batch_{i}" for i in range(1, 6)), 10_000, "test_batch", 10_000,
                         1, "labels", "batches.meta", "label_names", "batches.meta.txt"),
    "cifar100": Published(100, ("train",), 50_000, "test", 10_000,
                          2, "fine_labels", "meta", "fine_label_names", "fine_label_names.txt"),
}  # fmt: skip


def read(kind: str, source: Path) -> Content:
    """The set ``kind`` of `KNOWN`. Refused for a file that is missing, is not as published, or does more than hold data."""
    known = KNOWN[kind]
    sizes = _sizes(known)
    files = _from_folder(source, sizes) if source.is_dir() else _from_archive(source, sizes)
    binary = f"{known.test}.bin" in files
    needed = {f"{name}.bin" for name in known.samples} | {known.names} if binary else {*known.samples, known.meta}
    if missing := sorted(needed - set(files)):
        raise Refused(f"{source} lacks {', '.join(missing)}: give the archive or the folder of {kind} as published, "
                      "binary or Python version")  # fmt: skip
    samples = _binary if binary else _pickled
    parts = {name: samples(known, files, name, f"{source}: {name}") for name in known.samples}
    train, test = (Split(*map(np.concatenate, zip(*(parts[name] for name in names), strict=True)))
                   for names in (known.train, (known.test,)))  # fmt: skip
    return Content(train, test, _class_names(known, files, binary, source), SOURCE, "not stated by the author")


def _sizes(known: Published) -> dict[str, int]:
    """The largest that each file may be, in bytes."""
    sizes = {name: samples * (PIXELS + PER_SAMPLE) + MOST_NAMES for name, samples in known.samples.items()}
    sizes |= {f"{name}.bin": samples * (PIXELS + known.labels) for name, samples in known.samples.items()}
    return sizes | {known.meta: MOST_NAMES, known.names: MOST_NAMES}


def _from_folder(source: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """The files by name, from the folder or the only one in it that has any."""
    inner = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    folder = next((path for path in inner if any((path / name).is_file() for name in sizes)), source)
    files = {}
    for name, most in sizes.items():
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                files[name] = _within(file.read, most, f"{folder / name}")
    return files


def _from_archive(source: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """The files by name, from a .tar.gz, which is expanded in memory as far as a published one goes."""
    if not source.is_file():
        raise Refused(f"{source} does not exist: give the archive or the folder, as published")
    most = max(sum(size for name, size in sizes.items() if name.endswith(".bin") == binary) for binary in (True, False))
    files: dict[str, bytes] = {}
    try:
        with gzip.open(source) as expanded:
            content = io.BytesIO(_within(expanded.read, most + MOST_BESIDES, str(source)))
        with tarfile.open(fileobj=content, mode="r:") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in sizes and not member.isdir():
                    if not member.isreg() or name in files:
                        raise Refused(f"{source}: {name} is {'there twice' if name in files else 'a link'}: get it again")
                    files[name] = _within(archive.extractfile(member).read, sizes[name], f"{source}: {name}")
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise Refused(f"{source} is not a whole .tar.gz ({' '.join(str(error).split())}): get it again") from None
    return files


def _within(read: Callable[[int], bytes], most: int, where: str) -> bytes:
    content = read(most + 1)
    if len(content) > most:
        raise Refused(f"{where} has more than the {most:,} bytes that it can have as published: get it again")
    return content


Samples = tuple[np.ndarray, np.ndarray]
"""Images uint8 [N, 3, 32, 32] and labels int32 [N]."""


def _binary(known: Published, files: dict[str, bytes], name: str, where: str) -> Samples:
    content, record = files[f"{name}.bin"], PIXELS + known.labels
    if len(content) != known.samples[name] * record:
        raise Refused(f"{where}.bin has {len(content):,} bytes instead of {known.samples[name] * record:,}: get it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _checked(known, rows[:, known.labels :].reshape(-1, *SHAPE), rows[:, known.labels - 1].tolist(), f"{where}.bin")


def _pickled(known: Published, files: dict[str, bytes], name: str, where: str) -> Samples:
    found = pickles.loads(files[name], where)
    images, labels, count = found.get("data"), found.get(known.key), known.samples[name]
    if not isinstance(images, np.ndarray) or images.shape != (count, PIXELS):
        raise Refused(f'{where} has no "data" of {count} x {PIXELS} bytes: get it again')
    if not isinstance(labels, list) or len(labels) != count or not all(type(label) is int for label in labels):
        raise Refused(f'{where} has no "{known.key}", {count} whole numbers: get it again')
    return _checked(known, images.reshape(-1, *SHAPE), labels, where)


def _checked(known: Published, images: np.ndarray, labels: list[int], where: str) -> Samples:
    for sample, label in enumerate(labels):
        if not 0 <= label < known.classes:
            raise Refused(f"{where}: sample {sample} has the label {label}, there are {known.classes} classes: get it again")
    return images, np.array(labels, np.int32)


def _class_names(known: Published, files: dict[str, bytes], binary: bool, source: Path) -> tuple[str, ...]:
    where = f"{source}: {known.names if binary else known.meta}"
    names: Any = files[known.names].split() if binary else pickles.loads(files[known.meta], where).get(known.names_key)
    try:
        decoded = tuple(name.decode("ascii") if isinstance(name, bytes) else str(name) for name in names)
    except (TypeError, UnicodeDecodeError):
        decoded = ()
    if len(set(decoded)) != known.classes:
        raise Refused(f"{where} does not hold the names of {known.classes} classes: get it again")
    return decoded
