"""Samples: in memory, or in their file where training reads them if they do not fit into memory."""

from __future__ import annotations

from dataclasses import dataclass

import h5py
import numpy as np

from dpresnet.errors import Refused


@dataclass(frozen=True, eq=False)
class Split:
    """Samples in memory: ``images`` uint8 [N, C, H, W] and ``labels`` int32 [N].

    Whoever feeds a network needs only ``labels``, ``shape``, ``len()`` and ``take``; a `FileSplit` has the same four.
    To be written, ``images`` need only ``dtype``, ``shape``, ``ndim``, ``size``, ``len()`` and slices of rows, so they may be
    mapped from a file or put together as they are asked for.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every sample."""
        return self.images.shape[1:]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """A copy of the images at ``indices`` int64 [n], in that order: uint8 [n, C, H, W]."""
        return self.images[indices]


@dataclass(frozen=True, eq=False)
class FileSplit(Split):
    """Samples of a file that stays open: ``images`` uint8 [N, C, H, W] there, ``labels`` int32 [N] in memory."""

    images: h5py.Dataset

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The images at ``indices`` int64 [n], in that order: uint8 [n, C, H, W].

        Each chunk is read once, in the order of the file. Refused, with the sample, for a chunk that is damaged.
        """
        indices = np.asarray(indices, np.int64)
        rows, taken = self.images.chunks[0], np.empty((len(indices), *self.shape), np.uint8)
        sorted_by_row = np.argsort(indices, kind="stable")
        changes = np.flatnonzero(np.diff(indices[sorted_by_row] // rows)) + 1
        for positions in np.split(sorted_by_row, changes) if len(indices) else []:
            wanted = indices[positions]
            first = int(wanted[0]) // rows * rows
            taken[positions] = self._rows(first, min(first + rows, len(self)), int(wanted[0]))[wanted - first]
        return taken

    def _rows(self, first: int, stop: int, sample: int) -> np.ndarray:
        """The images of a row of chunks, which ``sample`` lies in."""
        images = np.empty((stop - first, *self.shape), np.uint8)
        rows = self.images.id.get_space()
        rows.select_hyperslab((first, 0, 0, 0), images.shape)
        try:
            self.images.id.read(h5py.h5s.create_simple(images.shape), rows, images)  # read_direct selects in Python
        except OSError as error:
            reason = " ".join(str(error).split())
            raise Refused(f"dataset {self.images.file.filename}: {self.images.name} is damaged at sample {sample}, in rows "
                          f"{first} to {stop - 1} ({reason}): prepare the file again, or copy it again") from error  # fmt: skip
        return images
