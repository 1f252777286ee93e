"""Checkpoints: named arrays and a JSON-able dict in, one self-verifying HDF5 file out. No MPI, no OpenCL, no pickle.

A directory holds ``step-00001234.h5`` for the last few saves and ``best.h5`` for the best one so far. A file is either
complete or not there under its name: it is written to ``NAME.tmp-PID`` beside it, synced, renamed, and the directory is
synced, before anything older is removed. One process writes to a directory; any number may read.

File format, version 1. Any HDF5 reader opens it, for example ``h5py.File("best.h5")["param/conv1.weight"][...]``:

    bytes 0..511    the user block, which HDF5 readers skip, little-endian:
                      0  8 bytes   b"DPRESNET"
                      8  uint32    format version, 1
                     12  uint64    number of bytes after the user block
                     20  32 bytes  SHA-256 of the bytes after the user block
                     52            zeros
    /param/NAME     parameters, such as /param/layer1.0.conv1.weight
    /momentum/NAME  momentum of the optimizer, one per parameter
    /buffer/NAME    running statistics, such as /buffer/bn1.running_mean
    /second_moment/NAME              AdamW: the second moment, one per parameter (the first is the momentum)
    /ema_param/NAME /ema_buffer/NAME moving averages of parameters and running statistics, if the run has them
    /meta           uint8 [n]: UTF-8 JSON text of one object (step, epoch, seed, loss scaler, configuration ...)

All arrays are little-endian float32, float64, int64 or uint8, of any shape including () and (0,), finite, stored
contiguously and without filters. Equal content gives equal bytes with the same HDF5 library.

``load`` checks length and SHA-256 before HDF5 sees a byte, and then admits exactly what is listed above, because HDF5
can be made to read other files (external storage and links, virtual datasets), to load code (filters) and to allocate
without bound (sparse datasets). The hash proves that a file is intact, not who wrote it.
"""

import errno
import hashlib
import io
import json
import os
import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from .errors import Refused

Arrays = Mapping[str, np.ndarray]
KINDS = ("buffer", "momentum", "param")
MORE_KINDS = ("ema_buffer", "ema_param", "second_moment")  # where a run has them
DTYPES = tuple(np.dtype(code) for code in ("<f4", "<f8", "<i8", "u1"))

_MAGIC, _VERSION = b"DPRESNET", 1
_HEADER = struct.Struct("<8sIQ32s")
_USER_BLOCK = 512  # the smallest that HDF5 allows

_ARRAY_NAME = re.compile(rf"({'|'.join(KINDS + MORE_KINDS)})/\w+(\.\w+)*", re.ASCII)
_STEP_FILE = re.compile(r"step-(\d{8,})\.h5")
_TEMPORARY_FILE = re.compile(r"(?:step-\d{8,}|best|probe)\.h5\.tmp-(\d{1,7})")


class BadCheckpoint(Refused):
    """A file that cannot be used as a checkpoint, and the reason."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"checkpoint {path} refused: {reason}")
        self.path, self.reason = path, reason


class SaveFailed(OSError):
    """A checkpoint could not be written. Earlier ones are as they were, and no temporary file stays behind."""

    def __init__(self, path: Path, cause: OSError):
        super().__init__(cause.errno, cause.strerror, str(path))

    def __str__(self) -> str:
        return f"cannot save checkpoint {self.filename}: {self.strerror}; {_remedy(self)}; earlier checkpoints are kept"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: ``arrays`` maps names such as "param/fc.bias" to arrays, ``meta`` is the saved dict."""

    path: Path
    arrays: dict[str, np.ndarray]
    meta: dict


def save(directory: str | Path, step: int, arrays: Arrays, meta: dict, keep: int, best: bool = False) -> Path:
    """Write ``step-<step>.h5`` (and ``best.h5`` if ``best``), then keep it and the ``keep - 1`` steps before it.

    Raises ValueError, before the disk is touched, for a name, type or non-finite value that a checkpoint cannot hold,
    and SaveFailed if the disk is full, read-only or broken.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step {step} must be at least 0 and keep {keep} at least 1")
    directory = Path(directory)
    target = directory / f"step-{step:08d}.h5"
    image = _build(arrays, meta)
    try:
        if best:  # first: a step file that knows the new best metric must not outlive a crash beside the old best.h5
            _write(directory / "best.h5", image)
        _write(target, image)
        _prune(directory, step, keep)
    except OSError as error:
        raise SaveFailed(target, error) from error
    return target


def load(path: str | Path) -> Checkpoint:
    """Read and verify one checkpoint; raises BadCheckpoint with the reason."""
    path = Path(path)
    try:
        return Checkpoint(path, *_parse(_read_verified(path)))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # the last three are h5py's
        raise BadCheckpoint(path, str(error)) from error


def newest(directory: str | Path) -> tuple[Checkpoint, list[BadCheckpoint]] | None:
    """The newest checkpoint that is good, and the newer ones that are not; None if the directory holds none at all.

    ``best.h5`` is the last resort. Raises Refused if there are checkpoints and none is good: starting afresh in silence
    would throw away the run that somebody asked to resume.
    """
    best = Path(directory) / "best.h5"
    candidates = [path for _, path in _step_files(Path(directory))] + [best] * best.exists()
    rejected = []
    for path in candidates:
        try:
            return load(path), rejected
        except BadCheckpoint as bad:
            rejected.append(bad)
    if not rejected:
        return None
    remedy = "resume from another path, or move them away to start afresh"
    raise Refused(f"none of the {len(rejected)} checkpoints in {directory} is usable; {remedy}; {rejected[0]}")


def check_writable(directory: str | Path) -> None:
    """Create ``directory`` and go through a save in small, so that a bad one is Refused before training, not after."""
    probe = Path(directory) / "probe.h5"
    try:
        _write(probe, memoryview(b"probe"))
        os.unlink(probe)
    except OSError as error:
        raise Refused(f"cannot save checkpoints in {directory}: {error.strerror}; {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space, raise the quota or the file size limit, or lower --keep"
    return "choose a directory that can be written with --out"


def _build(arrays: Arrays, meta: dict) -> memoryview:
    """The whole file in memory. libhdf5 never writes to disk itself: it can crash on closing a file on a full disk."""
    text = json.dumps(meta, sort_keys=True, allow_nan=False).encode()
    stream = io.BytesIO()
    with h5py.File(stream, "w", libver=("v110", "v110"), userblock_size=_USER_BLOCK) as file:
        for kind in (*KINDS, *(kind for kind in MORE_KINDS if any(name.startswith(f"{kind}/") for name in arrays))):
            file.create_group(kind)
        for name in sorted(arrays):
            array = np.asarray(arrays[name])
            _check_array(name, array)
            file.create_dataset(name, data=array, track_times=False)
        file.create_dataset("meta", data=np.frombuffer(text, np.uint8), track_times=False)
    image = stream.getbuffer()
    content = image[_USER_BLOCK:]
    image[:_USER_BLOCK] = _user_block(len(content), hashlib.sha256(content).digest())
    return image


def _check_array(name: str, array: np.ndarray) -> None:
    if not _ARRAY_NAME.fullmatch(name):
        raise ValueError(f'array name "{name}" is not KIND/NAME with KIND one of {", ".join(KINDS + MORE_KINDS)}')
    if array.dtype not in DTYPES:
        raise ValueError(f"array {name} is {array.dtype}, not one of {', '.join(map(str, DTYPES))}")
    if not np.isfinite(array).all():
        raise ValueError(f"array {name} has non-finite values")


def _user_block(length: int, digest: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, length, digest).ljust(_USER_BLOCK, b"\0")


def _read_verified(path: Path) -> bytes:
    """The bytes of the file, if signature, version, length and SHA-256 agree; ValueError with the reason otherwise."""
    with open(path, "rb") as file:
        block = file.read(_USER_BLOCK)
        length, digest = _parse_user_block(block)
        size = os.fstat(file.fileno()).st_size
        if size != _USER_BLOCK + length:
            raise ValueError(f"has {size} bytes instead of {_USER_BLOCK + length}")
        file.seek(0)
        image = file.read()
    if hashlib.sha256(memoryview(image)[_USER_BLOCK:]).digest() != digest:
        raise ValueError("damaged: the content does not match its SHA-256")
    return image


def _parse_user_block(block: bytes) -> tuple[int, bytes]:
    if len(block) < _USER_BLOCK:
        raise ValueError(f"has {len(block)} bytes, less than the {_USER_BLOCK} of a user block")
    magic, version, length, digest = _HEADER.unpack_from(block)
    if magic != _MAGIC:
        raise ValueError("is not a dpresnet checkpoint")
    if version != _VERSION:
        raise ValueError(f"has format version {version}, this program reads version {_VERSION}")
    if block != _user_block(length, digest):
        raise ValueError("damaged: the user block has bytes that should be zero")
    return length, digest


def _parse(image: bytes) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and meta of an intact image. Nothing is read before everything in it has passed the allow-list."""
    with h5py.File(io.BytesIO(image), "r") as file:
        datasets = _admit(file)
        needed = sum(dataset.nbytes for dataset in datasets.values())
        if needed > len(image):
            raise ValueError(f"its arrays claim {needed} bytes, the file has {len(image)}")
        arrays = {name: dataset[...] for name, dataset in datasets.items()}
    meta = json.loads(arrays.pop("meta").tobytes())
    if not isinstance(meta, dict):
        raise ValueError("meta is not a JSON object")
    for name, array in arrays.items():
        _check_array(name, array)
    return arrays, meta


def _admit(file: h5py.File) -> dict[str, h5py.Dataset]:
    """All datasets of the file by name; ValueError at the first thing that ``save`` does not write."""
    if set(file) - {*MORE_KINDS} != {*KINDS, "meta"}:
        raise ValueError(f"has the members {', '.join(file)} instead of {', '.join(KINDS)}, meta")
    datasets = {"meta": _admit_dataset(file, "meta")}
    for kind in sorted({*file} - {"meta"}):
        group = _follow(file, kind, h5py.Group)
        datasets |= {f"{kind}/{name}": _admit_dataset(group, name) for name in sorted(group)}
    return datasets


def _admit_dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    dataset = _follow(group, name, h5py.Dataset)
    creation = dataset.id.get_create_plist()
    if creation.get_layout() != h5py.h5d.CONTIGUOUS or creation.get_external_count():  # filters exist on chunks only
        raise ValueError(f"{dataset.name} is not stored contiguously, without filters and in this file")
    if dataset.dtype not in DTYPES or dataset.shape is None:
        raise ValueError(f"{dataset.name} is {dataset.dtype} {dataset.shape}, not an array of {DTYPES}")
    return dataset


def _follow(group: h5py.Group, name: str, expected: type) -> h5py.Group | h5py.Dataset:
    """The member behind a hard link. The link is looked at first: following a soft or external one opens its target."""
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{group.name} has a {type(link).__name__} {name}, a checkpoint has hard links only")
    member = group[name]
    if not isinstance(member, expected):
        raise ValueError(f"{member.name} is a {type(member).__name__}, not a {expected.__name__}")
    return member


def _write(target: Path, data: memoryview) -> None:
    """Put ``data`` at ``target``: at every instant, power cuts included, the old file is there or the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)  # before the rename: or a power cut leaves a right name on zeros
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # a file system that cannot sync directories
            raise
    finally:
        os.close(descriptor)


def _step_files(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every complete step file, newest first."""
    matches = map(_STEP_FILE.fullmatch, os.listdir(directory) if directory.exists() else ())
    return sorted(((int(match[1]), directory / match[0]) for match in matches if match), reverse=True)


def _prune(directory: Path, step: int, keep: int) -> None:
    """Remove the step files before ``step`` except the last ``keep - 1``.

    Later ones do not count and stay: a run that resumed from an older file because the newer ones were damaged must not
    push out its own, good file in favour of those.
    """
    older = [path for number, path in _step_files(directory) if number < step]
    for path in older[keep - 1 :]:
        os.unlink(path)


def _remove_leftovers(directory: Path) -> None:
    """Remove temporary files whose writer is dead, or was an earlier process with our id."""
    for match in filter(None, map(_TEMPORARY_FILE.fullmatch, os.listdir(directory))):
        if int(match[1]) == os.getpid() or not _alive(int(match[1])):
            with suppress(OSError):
                os.unlink(directory / match[0])


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # a process of somebody else may not be signalled, but it is there
    return True
