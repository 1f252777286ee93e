"""Decoded images on their way into a data set, in a folder that outlives the program: what is done is never done again.

    plan.json   what is decoded, as a digest of all that the pixels depend on, and the shape of an image
    images      uint8 [N, C, H, W], mapped into memory
    status      a byte for each image: 1 once it is in ``images``
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np

from dpresnet.errors import Refused

DONE = 1


class Staging:
    """``count`` images of a ``plan`` in ``folder``, which is made; ``found`` says whether it was there for this plan already,
    ``foreign`` whether it was there for another one, whose images are then gone.

    Until `begin`, ``shape`` is None for a new plan.
    """

    def __init__(self, folder: Path, plan: str, count: int):
        self.folder, self.plan, self.count = folder, plan, count
        self.shape: tuple[int, int, int] | None = None
        folder.mkdir(exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise Refused(f"{folder} is in use by another run of this program: wait for it, or give another OUT") from None
        held = self._held_plan()
        self.found, self.foreign = held.get("plan") == plan, held.get("plan", plan) != plan
        if self.found:
            self._map(tuple(held["shape"]))
        else:
            self._clear()

    def close(self, remove: bool) -> None:
        """Gives the folder back to other runs, or removes it."""
        if remove:
            shutil.rmtree(self.folder)
        self._lock.close()

    def _held_plan(self) -> dict:
        try:
            return json.loads((self.folder / "plan.json").read_text())
        except (OSError, ValueError):
            return {}

    def _clear(self) -> None:
        for name in ("plan.json", "status", "images"):  # the plan first: without it the others mean nothing
            (self.folder / name).unlink(missing_ok=True)

    def begin(self, shape: tuple[int, int, int]) -> None:
        """Makes room for images of this shape. Refused if the disk has too little of it, also for the data set to come."""
        nbytes = self.count * int(np.prod(shape))
        free = shutil.disk_usage(self.folder).free
        if free < 2 * nbytes:
            raise Refused(f"{self.folder.parent}: decoding and writing take {2 * nbytes / 1e9:.1f} GB, of which "
                          f"{free / 1e9:.1f} GB are free: make room, or give an OUT on another disk")  # fmt: skip
        for name, size in (("images", nbytes), ("status", self.count)):
            with (self.folder / name).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a mapped file that finds the disk full kills the process
        whole = self.folder / "plan.json.new"
        whole.write_text(json.dumps({"plan": self.plan, "shape": shape}))
        whole.replace(self.folder / "plan.json")
        self._map(shape)

    def _map(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.images = np.memmap(self.folder / "images", np.uint8, "r+", shape=(self.count, *shape))
        self.status = np.memmap(self.folder / "status", np.uint8, "r+", shape=(self.count,))

    @property
    def missing(self) -> np.ndarray:
        """The images that are not there, ascending: int64 [n]."""
        return np.flatnonzero(self.status != DONE)

    def commit(self, stored: list[int]) -> None:
        """These images have been stored: they are on disk before their status is."""
        if stored:
            self.images.flush()
            self.status[stored] = DONE
            self.status.flush()
