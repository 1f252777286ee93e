"""What a reader of some other format hands to `prepare`, and what readers have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dpresnet.datasets.schema import Split
from dpresnet.errors import Refused

NOT_STATED = "not stated"


@dataclass(frozen=True, eq=False)
class Content:
    """Both splits, the names of the classes, where the samples come from and under which terms.

    ``notes`` are lines for the reader of the terminal, ``skipped`` says which files were left out and why.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: str
    licence: str = NOT_STATED
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of an array in another order, put together when they are asked for: what `schema.write` needs of images."""

    array: np.ndarray
    chosen: np.ndarray  # int64 [N]

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.chosen), *self.array.shape[1:]

    @property
    def size(self) -> int:
        return len(self.chosen) * self.array[0].size

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.array[self.chosen[rows]]


def held_out(keys: Iterable[bytes], labels: Sequence[int], names: Sequence[str], fraction: float) -> np.ndarray:
    """Which samples are for testing: bool [N]. Of every class it is ``fraction``, rounded, at least one sample, never all.

    Those are taken whose ``keys`` have the smallest SHA-256; so it does not depend on the order of the samples. Refused for
    a class of a single sample.
    """
    digests = [hashlib.sha256(key).digest() for key in keys]
    test = np.zeros(len(digests), bool)
    members: dict[int, list[int]] = {}
    for sample, label in enumerate(labels):
        members.setdefault(label, []).append(sample)
    for label, samples in members.items():
        if len(samples) < 2:
            raise Refused(f"--test-fraction {fraction}: class {names[label]} has a single sample, which cannot be in both "
                          "splits: add more, or remove it")  # fmt: skip
        count = min(max(1, round(fraction * len(samples))), len(samples) - 1)
        test[sorted(samples, key=lambda sample: (digests[sample], sample))[:count]] = True
    return test
