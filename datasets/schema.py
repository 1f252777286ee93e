"""The data format: the train and test split of an image classification set in one HDF5 file. README.md lists its parts.

``write`` makes such a file; ``read`` admits what ``write`` makes and refuses everything else with a reason. It looks at
links, types, shapes and filters before it reads any data, because HDF5 can be made to read other files (external and
soft links, external storage, virtual data sets), to load code (filters) and to allocate without bound (chunks never
written). All text is stored with a fixed length: that puts it in object headers, which HDF5 checksums, whereas text of
variable length lies in a heap that nothing protects.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, inf, prod
from pathlib import Path

import h5py
import numpy as np

from dpresnet.datasets.split import FileSplit, Split
from dpresnet.errors import Refused

FORMAT, VERSION = "dpresnet-dataset", 1
SPLITS = ("train", "test")

_TEXTS = ("name", "source", "licence")
_CHUNK_BYTES = 1 << 14  # little is read in vain where samples are read in any order
_LARGEST_CHUNK_BYTES = 1 << 24  # that samples are read from one by one
_BLOCK_BYTES = 1 << 22  # of a split that is handled at a time
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Both splits and what is known of them. ``mean`` and ``std`` float32 [C] are of training images scaled to 0..1."""

    name: str
    source: str
    licence: str
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    fingerprint: str
    train: Split
    test: Split

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every sample."""
        return self.train.shape


def assemble(name: str, source: str, licence: str, class_names: tuple[str, ...], train: Split, test: Split) -> Dataset:
    """A Dataset with its statistics and fingerprint worked out from the splits."""
    return Dataset(name, source, licence, class_names, *statistics(train.images), fingerprint(train, test), train, test)


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel of uint8 [N, C, H, W] scaled to 0..1: two float32 [C].

    Counting the 256 values first makes the sums exact and independent of the order of the samples. A channel that is
    constant gets the deviation 1, so that normalising it gives zeros.
    """
    values = np.arange(256) / 255
    counts = np.zeros((images.shape[1], 256), np.int64)
    for _, block in _blocks(images):
        for channel, row in enumerate(counts):
            row += np.bincount(block[:, channel].reshape(-1), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    deviation = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)


def fingerprint(train: Split, test: Split) -> str:
    """SHA-256 (hex) over the arrays of both splits: for each a line with path, type and shape, then its bytes."""
    digest = hashlib.sha256()
    for name, split in zip(SPLITS, (train, test), strict=True):
        for part, array, dtype in (("images", split.images, "u1"), ("labels", split.labels, "<i4")):
            digest.update(f"{name}/{part} {dtype} {'x'.join(map(str, array.shape))}\n".encode())
            for _, block in _blocks(array):
                digest.update(np.ascontiguousarray(block, dtype))
    return digest.hexdigest()


def _blocks(array: np.ndarray, rows: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """The array in slices of whole ``rows``, each with its first row: memory is bounded also where it is not in memory."""
    row_bytes = array.dtype.itemsize * prod(array.shape[1:])
    step = rows * max(1, _BLOCK_BYTES // max(1, rows * row_bytes))
    for first in range(0, len(array), step):
        yield first, array[first : first + step]


def write(path: str | Path, dataset: Dataset, chunk_bytes: int = _CHUNK_BYTES, gzip: int | None = None) -> None:
    """Write ``dataset`` to ``path``, in chunks of about ``chunk_bytes`` but at least one sample, compressed at a level of
    ``gzip`` if given; ValueError if the format cannot hold it.

    Equal content gives equal bytes with the same build of HDF5 and zlib, as nothing in a file depends on when or where
    it was made (from h5py 3.15 on: older ones put the time into groups).
    """
    _check(dataset)
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")  # a file under the final name is complete
    try:
        with h5py.File(unfinished, "w", libver=("v110", "v110")) as file:  # older formats have no checksums on metadata
            _write_attributes(file, dataset)
            for name in SPLITS:
                _write_split(file.create_group(name), getattr(dataset, name), chunk_bytes, gzip)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_attributes(file: h5py.File, dataset: Dataset) -> None:
    file.attrs["version"] = np.int32(VERSION)
    texts = {name: getattr(dataset, name) for name in (*_TEXTS, "fingerprint")}
    for name, text in (texts | {"format": FORMAT, "class_names": json.dumps(dataset.class_names)}).items():
        encoded = text.encode() or b"\0"  # HDF5 has no text of length 0
        file.attrs.create(name, np.array(encoded), dtype=h5py.string_dtype("utf-8", len(encoded)))
    file.attrs["mean"], file.attrs["std"] = dataset.mean, dataset.std


def _write_split(group: h5py.Group, split: Split, chunk_bytes: int, gzip: int | None) -> None:
    for name, array, dtype in (("images", split.images, "u1"), ("labels", split.labels, "<i4")):
        _write_array(group, name, array, dtype, chunk_bytes, gzip)


def _write_array(group: h5py.Group, name: str, array: np.ndarray, dtype: str, chunk_bytes: int, gzip: int | None) -> None:
    row_bytes = array.dtype.itemsize * prod(array.shape[1:])
    rows = min(len(array), max(1, chunk_bytes // row_bytes))
    chunks = (rows, *array.shape[1:])
    stored = group.create_dataset(name, array.shape, dtype, chunks=chunks, fletcher32=True, compression=gzip)
    for first, block in _blocks(array, rows):
        stored[first : first + len(block)] = block


def read(path: str | Path, budget_bytes: float = inf) -> Dataset:
    """Read and verify a file of this format; Refused with the reason if it is not one or is damaged.

    If the images of both splits take more than ``budget_bytes`` they stay in the file: the splits are `FileSplit`, whose
    chunks are verified when they are read, and the file stays open. The fingerprint is then taken as the file has it.
    """
    try:
        with open(path, "rb"):  # h5py words these errors less well
            pass
    except OSError as error:
        raise Refused(f"dataset {path} cannot be opened: {error.strerror}") from error
    try:
        dataset = _read(Path(path), budget_bytes)
        _check(dataset)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:  # whatever h5py may raise
        raise Refused(f"dataset {path} refused: {_reason(error)}; datasets/README.md describes the format") from error
    return dataset


def _reason(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)  # a KeyError quotes its text
    return " ".join(text.split()) or type(error).__name__


def _read(path: Path, budget_bytes: float) -> Dataset:
    if not h5py.is_hdf5(path):
        raise ValueError("it is not an HDF5 file")
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(h5py.File(path, "r", locking="best-effort"))  # network file systems may not support locks
        if _text(file, "format") != FORMAT:
            raise ValueError(f'its attribute "format" is {_text(file, "format")!r}, not {FORMAT!r}')
        if (version := int(_attribute(file, "version"))) != VERSION:
            raise ValueError(f"it has format version {version}, this program reads version {VERSION}")
        texts = [_text(file, name) for name in _TEXTS]
        names = json.loads(_text(file, "class_names"))
        numbers = [_attribute(file, name) for name in ("mean", "std")]
        admitted = [_admit_split(file, name) for name in SPLITS]
        if sum(images.size for images, _ in admitted) <= budget_bytes:
            splits = [Split(*map(_read_rows, datasets)) for datasets in admitted]
        else:
            splits = [_stay(*datasets) for datasets in admitted]
            opened.pop_all()
        return Dataset(*texts, tuple(names), *numbers, _text(file, "fingerprint"), *splits)


def _attribute(file: h5py.File, name: str) -> object:
    if name not in file.attrs:
        raise ValueError(f'it has no attribute "{name}"')
    return file.attrs[name]


def _text(file: h5py.File, name: str) -> str:
    value = _attribute(file, name)
    if not isinstance(value, bytes | str):
        raise ValueError(f'its attribute "{name}" is not text')
    return value.decode() if isinstance(value, bytes) else value


def _admit_split(file: h5py.File, name: str) -> tuple[h5py.Dataset, h5py.Dataset]:
    group = _follow(file, name, h5py.Group)
    images, labels = (_follow(group, part, h5py.Dataset) for part in ("images", "labels"))
    _admit_dataset(images, "u1", 4)
    _admit_dataset(labels, "<i4", 1)
    return images, labels


def _follow(group: h5py.Group, name: str, expected: type) -> h5py.Group | h5py.Dataset:
    """The member behind a hard link. The link is looked at first: following a soft or external one opens its target."""
    if name not in group:
        raise ValueError(f"it has no {group.name.rstrip('/')}/{name}")
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{group.name.rstrip('/')}/{name} is a {type(link).__name__}, only hard links are followed")
    member = group[name]
    if not isinstance(member, expected):
        raise ValueError(f"{member.name} is a {type(member).__name__}, not a {expected.__name__}")
    return member


def _admit_dataset(dataset: h5py.Dataset, dtype: str, dimensions: int) -> None:
    """ValueError unless the type, the storage and the filters are those of the format, and every chunk is there."""
    if dataset.dtype != np.dtype(dtype) or len(dataset.shape or ()) != dimensions:
        raise ValueError(f"{dataset.name} is {dataset.dtype} {dataset.shape}, not {np.dtype(dtype)} in {dimensions}-D")
    layout = dataset.id.get_create_plist()
    if layout.get_layout() != h5py.h5d.CHUNKED:  # so neither virtual nor external: HDF5 keeps that contiguous
        raise ValueError(f"{dataset.name} is not stored in chunks in this file")
    filters = {layout.get_filter(i)[0] for i in range(layout.get_nfilters())}
    if not filters <= _FILTERS or h5py.h5z.FILTER_FLETCHER32 not in filters:
        raise ValueError(f"{dataset.name} has filters {sorted(filters)}, not fletcher32 and perhaps gzip or shuffle")
    expected = prod(ceil(size / chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    if (stored := dataset.id.get_num_chunks()) != expected:
        raise ValueError(f"{dataset.name} has {stored} chunks instead of {expected}, it was not written to the end")


def _stay(images: h5py.Dataset, labels: h5py.Dataset) -> FileSplit:
    """A split whose images are not read; ValueError if a sample of it would take much memory."""
    if prod(images.chunks) > max(_LARGEST_CHUNK_BYTES, prod(images.shape[1:])):
        raise ValueError(f"{images.name} does not fit into the memory allowed (--data-mb), and has chunks of {images.chunks}, "
                         "too large to read samples from: allow more, or write it again by schema.write")  # fmt: skip
    return FileSplit(images, _read_rows(labels))


def _read_rows(dataset: h5py.Dataset) -> np.ndarray:
    """The whole data set, a row of chunks at a time, so that an error tells where the damage is."""
    array = np.empty(dataset.shape, dataset.dtype)
    for first in range(0, len(array), dataset.chunks[0]):
        rows = np.s_[first : min(first + dataset.chunks[0], len(array))]
        try:
            dataset.read_direct(array, rows, rows)
        except OSError as error:
            raise ValueError(f"{dataset.name} is damaged in rows {rows.start} to {rows.stop - 1}: {error}") from error
    return array


def _check(dataset: Dataset) -> None:
    """ValueError unless names, statistics, labels and fingerprint fit the images."""
    names, channels = dataset.class_names, dataset.train.shape[0]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names is {names!r}, not a list of names")
    for name in SPLITS:
        _check_split(name, getattr(dataset, name), dataset)
    for name, values in (("mean", dataset.mean), ("std", dataset.std)):
        if np.shape(values) != (channels,) or values.dtype != np.float32 or not np.isfinite(values).all():
            raise ValueError(f"{name} is {values!r}, not {channels} finite float32")
    if (dataset.std <= 0).any():
        raise ValueError(f"std is {dataset.std!r}, not positive")
    if isinstance(dataset.train, FileSplit):
        return
    if (actual := fingerprint(dataset.train, dataset.test)) != dataset.fingerprint:
        raise ValueError(f"its content has the fingerprint {actual}, the file says {dataset.fingerprint}")


def _check_split(name: str, split: Split, dataset: Dataset) -> None:
    images, labels = split.images, split.labels
    if images.dtype != np.uint8 or labels.dtype != np.int32 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(f"{name} has images {images.dtype} {images.shape} and labels {labels.dtype} {labels.shape}")
    if images.size == 0 or split.shape != dataset.shape:
        raise ValueError(f"{name} has images of shape {images.shape}, train of {dataset.train.images.shape}")
    if labels.min() < 0 or labels.max() >= dataset.classes:
        bad = int(np.flatnonzero((labels < 0) | (labels >= dataset.classes))[0])
        raise ValueError(f"{name} has the label {labels[bad]} at sample {bad}, there are {dataset.classes} classes")
