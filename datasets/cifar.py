"""CIFAR-10 and CIFAR-100 as published (Krizhevsky 2009): the binary or the Python version, as a folder or as a .tar.gz.

The Python version is pickled. `Reader` builds nothing from a pickle but dicts, lists, numbers, text and bytes: where NumPy's
classes are named it puts records of what was stored, which become arrays only after they have been checked.
"""

import io
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from dpresnet.datasets.schema import Split
from dpresnet.errors import Refused

IMAGE = (3, 32, 32)
PIXELS = 3 * 32 * 32
MOST_BYTES = 200_000_000  # of a member, which in the published files has at most 155,000,000


class Version(NamedTuple):
    """The files of one version: those of both splits, that with the class names, and the key of the labels in pickles."""

    train: tuple[str, ...]
    test: str
    names: str
    labels: str
    label_bytes: int  # before the pixels of a binary record; the last of them is the label


VERSIONS = {
    "cifar10": (
        Version(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", "", 1),
        Version(tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "labels", 0),
    ),
    "cifar100": (
        Version(("train.bin",), "test.bin", "fine_label_names.txt", "", 2),
        Version(("train",), "test", "meta", "fine_labels", 0),
    ),
}
NAMES_KEY = {"cifar10": "label_names", "cifar100": "fine_label_names"}


def read(kind: str, source: Path) -> tuple[tuple[str, ...], dict[str, Split]]:
    """Class names and both splits. Refused for a file that is missing, of another size, or that holds something else."""
    files = members(kind, source)
    for version in VERSIONS[kind]:
        if version.test in files:
            break
    else:
        tests = " or ".join(version.test for version in VERSIONS[kind])
        raise Refused(f"{source} is not {kind} as published: it has no {tests}")
    if missing := [name for name in (*version.train, version.names) if name not in files]:
        raise Refused(f"{source} lacks {', '.join(missing)}")
    load = pickled if version.labels else binary
    parts = {name: load(f"{source}: {name}", files[name], version) for name in (*version.train, version.test)}
    train = Split(*map(np.concatenate, zip(*(parts[name] for name in version.train), strict=True)))
    names = class_names(f"{source}: {version.names}", files[version.names], NAMES_KEY[kind] if version.labels else "")
    splits = {"train": train, "test": Split(*parts[version.test])}
    for split, found in splits.items():
        if found.labels.max() >= len(names):
            raise Refused(f"{source}: a {split} image has the label {found.labels.max()}, there are {len(names)} class names")
    return names, splits


def members(kind: str, source: Path) -> dict[str, bytes]:
    """The contents of the files that the versions of a kind have, by name. Nothing is unpacked onto the disk."""
    wanted = {name for version in VERSIONS[kind] for name in (*version.train, version.test, version.names)}
    try:
        if source.is_dir():
            found = [path for path in (source, *source.iterdir()) if path.is_dir()]
            files = {name: folder / name for folder in found for name in wanted if (folder / name).is_file()}
            return {name: _bounded(name, path.stat().st_size, path.open("rb")) for name, path in files.items()}
        with tarfile.open(source) as archive:
            listed = {PurePosixPath(entry.name).name: entry for entry in archive if entry.isfile()}
            files = {name: entry for name, entry in listed.items() if name in wanted}
            return {name: _bounded(name, entry.size, archive.extractfile(entry)) for name, entry in files.items()}
    except (OSError, tarfile.TarError, EOFError) as error:
        raise Refused(f"{source} cannot be read ({error}): give the folder or the .tar.gz of {kind}") from None


def _bounded(name: str, size: int, file: io.BufferedIOBase | None) -> bytes:
    with file:
        if size > MOST_BYTES:
            raise Refused(f"{name} has {size} bytes: the published files are smaller")
        return file.read(size)


def binary(name: str, data: bytes, version: Version) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of records of label bytes and pixels."""
    record = version.label_bytes + PIXELS
    if not data or len(data) % record:
        raise Refused(f"{name} has {len(data)} bytes, not a number of records of {record}: it is truncated or of another kind")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    return rows[:, version.label_bytes :].reshape(-1, *IMAGE), rows[:, version.label_bytes - 1].astype(np.int32)


def pickled(name: str, data: bytes, version: Version) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a batch of the Python version."""
    batch = unpickle(name, data)
    labels, pixels = batch.get(version.labels), batch.get("data")
    if not isinstance(pixels, Record) or not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise Refused(f"{name} does not hold an array data and a list {version.labels}")
    images = pixels.array(name)
    if not len(labels) or images.shape != (len(labels), PIXELS) or min(labels) < 0:
        raise Refused(f"{name}: data is {list(images.shape)} for {len(labels)} labels, not [N, {PIXELS}]")
    return images.reshape(-1, *IMAGE), np.array(labels, np.int32)


def class_names(name: str, data: bytes, key: str) -> tuple[str, ...]:
    """From a text file with a line for each, or under ``key`` of a pickle."""
    names = unpickle(name, data).get(key) if key else data.decode("utf-8", "replace").split("\n")
    if not isinstance(names, list) or not all(isinstance(text, str | bytes) for text in names):
        raise Refused(f"{name} holds no list {key}")
    texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else text.strip() for text in names]
    return tuple(text for text in texts if text)


# Pickles


class Record:
    """What a pickle says of an array, or of its element type."""

    def __init__(self, *arguments: Any):
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self, name: str) -> np.ndarray:
        """The bytes [N, M] that it stands for."""
        match self.state:
            case (int(), (int() as rows, int() as columns), Record() as kind, False | 0, bytes() as data):
                if kind.arguments[:1] in (("u1",), (b"u1",)) and len(data) == rows * columns:
                    return np.frombuffer(data, np.uint8).reshape(rows, columns)
        raise Refused(f"{name}: data is not a two-dimensional array of unsigned bytes")


def _latin(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the protocol of Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


class Reader(pickle.Unpickler):
    """An unpickler that knows nothing but `Record`."""

    def find_class(self, module: str, name: str) -> Any:
        """Stand-ins for what the published files name, and for nothing else."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return Record
        if module == "numpy" and name in ("ndarray", "dtype"):
            return Record
        if (module, name) == ("_codecs", "encode"):
            return _latin
        raise pickle.UnpicklingError(f"it names {module}.{name}, which the published files do not")


def unpickle(name: str, data: bytes) -> Mapping[str, Any]:
    """The dict of a pickle, its keys as text. Refused if it holds anything that `Reader` does not build."""
    try:
        found = Reader(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise Refused(f"{name} is refused: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(found, dict):
        raise Refused(f"{name} holds a {type(found).__name__}, not a dict")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in found.items()}
