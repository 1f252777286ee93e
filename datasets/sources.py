"""A folder or a zip file as a list of files: names, sizes, what is wrong with them, and their bytes within a limit."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dpresnet.datasets.images import Unusable
from dpresnet.errors import Refused

LINKS_FOLLOWED = 2  # levels of folders, SPLIT/CLASS, that may be links; deeper ones could go in circles


@dataclass(frozen=True)
class File:
    """A file: its path with "/" between the parts, its size in bytes, what changes when its content does, and why it
    cannot be used ("" if it can).
    """

    path: str
    size: int
    stamp: tuple[int, ...]
    fault: str = ""


class Folder:
    """The files below a folder. Links to files are followed, and links to folders for SPLIT and CLASS."""

    def __init__(self, root: Path):
        self.root = root

    def files(self) -> list[File]:
        """All files, sorted by the parts of their paths."""
        try:
            return sorted(self._walk("", 0), key=lambda file: file.path.split("/"))
        except OSError as error:
            raise Refused(f"{error.filename} cannot be read: {error.strerror}") from None

    def _walk(self, below: str, depth: int) -> Iterator[File]:
        with os.scandir(self.root / below) as entries:
            for entry in entries:
                path = f"{below}{entry.name}"
                if entry.is_dir(follow_symlinks=depth < LINKS_FOLLOWED):
                    yield from self._walk(f"{path}/", depth + 1)
                else:
                    yield self._file(path, entry)

    def _file(self, path: str, entry: os.DirEntry) -> File:
        try:
            found = entry.stat()
        except OSError as error:
            return File(path, 0, (), f"it cannot be read ({error.strerror})")
        regular = stat.S_ISREG(found.st_mode)
        return File(path, found.st_size, (found.st_mtime_ns,), "" if regular else "it is not a regular file")

    def read(self, file: File, most: int) -> bytes:
        """The content, of which at most ``most`` + 1 bytes are read; Unusable if there is more, or none can be had."""
        try:
            with open(self.root / file.path, "rb") as opened:
                return _within(opened.read(most + 1), most)
        except OSError as error:
            raise Unusable(f"it cannot be read ({error.strerror})") from None

    def close(self) -> None:
        """Nothing is open."""


class Zip:
    """The members of a zip file, which are read where they are: nothing is extracted."""

    def __init__(self, path: Path):
        try:
            self.archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, ValueError, RuntimeError) as error:  # RuntimeError: a version beyond Python's
            raise Refused(f"{path} cannot be read as a zip file: {error}") from None
        self.path, self.members = path, {}

    def files(self) -> list[File]:
        """All members but folders, sorted by the parts of their paths. Refused for names that lead out of a folder."""
        found = []
        for member in self.archive.infolist():
            if not _is_inside(member.orig_filename):
                raise Refused(f"{self.path}: its member {member.orig_filename!r} would be unpacked outside of the folder: "
                              "do not trust this file")  # fmt: skip
            if not member.is_dir():
                fault = _fault(member) or ("its name is there twice" if member.filename in self.members else "")
                self.members.setdefault(member.filename, member)
                found.append(File(member.filename, member.file_size, (*member.date_time, member.CRC), fault))
        return sorted(found, key=lambda file: file.path.split("/"))

    def read(self, file: File, most: int) -> bytes:
        """The content, of which no more is expanded than is announced; Unusable if that is more than ``most`` bytes, or it is
        damaged.
        """
        if file.size > most:
            raise Unusable(_too_large(most))
        try:
            with self.archive.open(self.members[file.path]) as opened:
                return opened.read(file.size + 1)  # so that the end is reached, where the checksum is compared
        except Exception as error:  # damaged, encrypted, of a compression unknown here: each library has errors of its own
            raise Unusable(" ".join(f"it cannot be unpacked ({error})".split())) from None

    def close(self) -> None:
        """Closes the zip file."""
        self.archive.close()


def shown(path: str) -> str:
    """The path for a message of one line, also where it holds line ends or bytes that are no text."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in path)


def open_source(path: Path) -> Folder | Zip:
    """A folder, or a zip file by its content; Refused for anything else."""
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise Refused(f"{path} does not exist: give a folder or a zip file")
    if not zipfile.is_zipfile(path):
        raise Refused(f"{path} is neither a folder nor a zip file: give one of them")
    return Zip(path)


def _is_inside(name: str) -> bool:
    """Whether a member's name stays in the folder on every system."""
    parts = name.split("/")
    return not (".." in parts or name.startswith("/") or "\\" in name or "\0" in name or re.match("[A-Za-z]:", name))


def _fault(member: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return "it is a link" if kind == stat.S_IFLNK else "it is not a regular file"
    return "it is encrypted" if member.flag_bits & 1 else ""


def _within(content: bytes, most: int) -> bytes:
    if len(content) > most:
        raise Unusable(_too_large(most))
    return content


def _too_large(most: int) -> str:
    return f"it has more than {most:,} bytes, which --max-pixels allows for"
