"""Images in folders, SPLIT/CLASS/*.jpg, in a directory or in a zip file: what is there, and its bytes."""

import hashlib
import os
import re
import stat
import threading
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dpresnet.datasets.pictures import FORMATS, BadPicture
from dpresnet.errors import Refused

SPLITS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
MOST_BYTES = 256 * 2**20  # of one file, unpacked


class Entry(NamedTuple):
    """A file: its path with slashes below the source, its bytes, and what changes when it changes."""

    path: str
    size: int
    stamp: str


class Item(NamedTuple):
    """An image and the index of its class."""

    entry: Entry
    label: int


class Directory:
    """The files below a directory. Links to files are followed, links to directories are not."""

    def __init__(self, root: Path):
        self._root = root
        self.entries = []
        for folder, names, files in os.walk(root):
            names.sort()
            for name in sorted(files):
                path = Path(folder, name)
                found = path.stat() if path.exists() else path.lstat()  # a link to nothing is found when it is read
                relative = path.relative_to(root).as_posix()
                self.entries.append(Entry(relative, found.st_size, f"{found.st_mtime_ns}"))

    def read(self, entry: Entry) -> bytes:
        """The bytes of a file; BadPicture if it cannot be read."""
        if entry.size > MOST_BYTES:
            raise BadPicture(f"has {entry.size} bytes, more than an image file of {MOST_BYTES}")
        try:
            return (self._root / entry.path).read_bytes()
        except OSError as error:
            raise BadPicture(f"cannot be read: {error.strerror}") from None


class Zip:
    """The members of a zip file, read from any thread. Refused if a member's name leads out of the folder it is in."""

    def __init__(self, path: Path):
        try:
            self._file = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise Refused(f"{path} cannot be read as a zip file: {error}") from None
        self._lock, self._members, self.entries = threading.Lock(), {}, []
        for member in self._file.infolist():
            name = member.filename
            if "\\" in name or name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in PurePosixPath(name).parts:
                raise Refused(f"{path} has the member {name!r}, which leads out of it: it is refused whole")
            if not member.is_dir():
                self._members[name] = member
                self.entries.append(Entry(name, member.file_size, f"{member.CRC:08x}"))
        self.entries.sort()

    def read(self, entry: Entry) -> bytes:
        """The bytes of a member; BadPicture if it is a link, encrypted, damaged or expands too far."""
        member = self._members[entry.path]
        if stat.S_ISLNK(member.external_attr >> 16):
            raise BadPicture("is a link")
        if member.flag_bits & 1:
            raise BadPicture("is encrypted")
        if member.file_size > MOST_BYTES:
            raise BadPicture(f"expands to {member.file_size} bytes, more than an image file of {MOST_BYTES}")
        try:
            with self._lock, self._file.open(member) as file:
                data = file.read(member.file_size + 1)
        except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError) as error:
            raise BadPicture(f"cannot be unpacked: {error}") from None
        except Exception as error:  # of the compression, which has classes of its own
            raise BadPicture(f"cannot be unpacked: {error}") from None
        if len(data) != member.file_size:
            raise BadPicture(f"holds another number of bytes than the {member.file_size} it announces")
        return data


Store = Directory | Zip


def open_store(source: Path) -> Store:
    """The files of a directory or a zip file."""
    if source.is_dir():
        return Directory(source)
    if not source.exists():
        raise Refused(f"{source} does not exist: give a directory or a zip file of SPLIT/CLASS/*.jpg")
    return Zip(source)


@dataclass
class Listing:
    """The images of a source by split, in the order of class and path; what is no image file by its name is passed over."""

    class_names: tuple[str, ...]
    items: dict[str, list[Item]]
    bad: list[tuple[str, str]] = field(default_factory=list)
    passed_over: int = 0

    @property
    def digest(self) -> str:
        """Changes with every name, size, time and label."""
        lines = [f"{split} {item!r}\n" for split in sorted(self.items) for item in self.items[split]]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def listing(store: Store, held_out: float = 0.0) -> Listing:
    """The images of a store. Without a test split, ``held_out`` is the share of each class that becomes one.

    A single folder around the splits is looked through. Refused without a train split, without test images, or if a class of
    the test split has no training images.
    """
    entries = {_below(entry.path): entry for entry in store.entries}
    if not any(parts[0] in SPLITS for parts in entries):
        entries = {parts[1:]: entry for parts, entry in entries.items() if len({p[0] for p in entries}) == 1 and len(parts) > 1}
    found: dict[str, list[tuple[str, Entry]]] = {"train": [], "test": []}
    result = Listing((), {})
    for parts, entry in sorted(entries.items()):
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if hidden or Path(parts[-1]).suffix.lower() not in FORMATS:
            result.passed_over += 1
        elif len(parts) != 3 or parts[0] not in SPLITS:
            result.bad.append((entry.path, "does not lie in SPLIT/CLASS/, with SPLIT train or test, val, valid, validation"))
        else:
            found[SPLITS[parts[0]]].append((parts[1], entry))
    result.class_names = tuple(sorted({name for name, _ in found["train"]}))
    if not result.class_names:
        raise Refused("there is no image train/CLASS/*.jpg, .png or .webp in the source")
    if strangers := sorted({name for name, _ in found["test"]} - set(result.class_names)):
        raise Refused(f"the class {strangers[0]!r} of the test split has no training images")
    if not found["test"]:
        found = _held_out(found["train"], held_out)
    labels = {name: label for label, name in enumerate(result.class_names)}
    result.items = {split: [Item(entry, labels[name]) for name, entry in files] for split, files in found.items()}
    return result


def _below(path: str) -> tuple[str, ...]:
    return PurePosixPath(path).parts


def _held_out(files: list[tuple[str, Entry]], share: float) -> dict[str, list[tuple[str, Entry]]]:
    """The images of each class with the smallest hashes of their paths become the test split: no matter what else is there."""
    if not share:
        raise Refused("the source has no test split (test, val, valid or validation): --test-fraction 0.1 holds out a tenth of "
                      "each class")  # fmt: skip
    test: set[str] = set()
    for name in {name for name, _ in files}:
        paths = [entry.path for owner, entry in files if owner == name]
        paths.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
        test.update(paths[: round(share * len(paths))])
    split = {"train": [f for f in files if f[1].path not in test], "test": [f for f in files if f[1].path in test]}
    if not all(split.values()):
        raise Refused(f"--test-fraction {share} leaves a split without images")
    return split
