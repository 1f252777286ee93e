"""Samples and the order in which they are seen.

There is no random state: the order of an epoch is a function of (seed, epoch), and the position in it is a number. So a
run resumes in mid-epoch exactly, and any number of ranks sees the same samples in the same global batches.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import trace
from .augment import Draws
from .datasets import schema
from .datasets.schema import Dataset, Split
from .errors import Refused

__all__ = ["Batch", "Dataset", "Loader", "Shard", "Split", "load", "order", "permutation", "steps_per_epoch"]

DIGITS = Path(schema.__file__).with_name("digits.h5")

_PREFETCHED = 2  # batches made ahead of the one in use
_SYNTHETIC_TRAIN, _SYNTHETIC_TEST = 2048, 512
_MEASURED = 128  # synthetic samples that give mean and std; they differ little
_MEASURED_BYTES = 2**25
_GRID, _SHIFTS = 4, 4096
_PATTERN_LEVELS, _NOISE_LEVELS = 192, 64  # a sum of one of each fits in a byte


def load(name: str, seed: int = 0, image: int = 32, channels: int = 3, classes: int = 10, budget_bytes: float = inf) -> Dataset:
    """The data set ``name``: "digits", "synthetic" or the path of a file in the format of ``datasets/README.md``.

    ``seed``, ``image``, ``channels`` and ``classes`` (0: ten) shape the synthetic one only. Files are read into memory,
    unless their images take more than ``budget_bytes``: then a batch is read when it is taken (`schema.read`).
    Raises Refused, without the name of the host, for a file that is missing, foreign or damaged.
    """
    if name == "synthetic":
        return _synthetic(seed, image, channels, classes or 10)
    if name != "digits" and not Path(name).exists():
        raise Refused(f"dataset {name!r} does not exist: give digits, synthetic or the path of an HDF5 file")
    return schema.read(DIGITS if name == "digits" else name, budget_bytes)


def permutation(n: int, key: tuple[int, int]) -> np.ndarray:
    """A permutation of 0..n-1 that ``key`` (two integers in 0..2^64-1) determines for good: int64 [n].

    The samples are sorted by 64 random bits each. NumPy guarantees the bits of its Philox counter-based generator
    (Salmon et al., SC'11) for all versions; it does not guarantee what ``Generator.permutation`` makes of them.
    """
    return np.argsort(_random_bits(n, key), kind="stable")


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of ``n`` samples in ``epoch``: a permutation, int64 [n], the same for any number of ranks."""
    return permutation(n, (seed, epoch))


def _random_bits(n: int, key: tuple[int, int]) -> np.ndarray:
    return np.random.Philox(key=np.array(key, np.uint64)).random_raw(n)


def steps_per_epoch(samples: int, batch: int) -> int:
    """The number of global batches of ``batch`` samples, the last of which may be short."""
    return -(-samples // batch)


class Shard(NamedTuple):
    """What one replica gets of a batch: images uint8 [n, C, H, W], labels int32 [n], sample indices int64 [n], and how they
    look, `dpresnet.augment.VIEW` [n], if the loader draws that.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    views: np.ndarray | None = None


class Batch(NamedTuple):
    """One step: its number in the epoch, a shard for every replica here, the sample count over all replicas."""

    step: int
    shards: list[Shard]
    count: int


def in_steps(batches: Iterable[Batch], accumulate: int) -> Iterator[list[Batch]]:
    """The micro-batches of each step: ``accumulate`` of them, fewer at the end of an epoch."""
    step: list[Batch] = []
    for batch in batches:
        step.append(batch)
        if len(step) == accumulate:
            yield step
            step = []
    if step:
        yield step


@dataclass(frozen=True, eq=False)
class Loader:
    """The batches of one epoch from step ``start`` on, for the replicas ``local`` out of ``replicas``.

    Global batch g is ``order[g*V*b : (g+1)*V*b]`` with V = ``replicas`` and b = ``batch``, and replica v has the slice
    of b samples that starts at v*b. The last batch holds what remains, so its later replicas may have fewer samples or
    none. A shuffled epoch passes ``order(seed, epoch, n)``; evaluation passes ``np.arange(n)``. ``draw`` gives the views of
    (indices, images).

    Iterating makes the next ``ahead`` batches in a thread. Its exceptions are raised here, at the batch that they belong to,
    and it ends with the iteration, whether that is exhausted, left early or failed.
    """

    split: Split
    order: np.ndarray
    replicas: int
    batch: int
    local: range
    start: int = 0
    ahead: int = _PREFETCHED
    draw: Draws | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.steps:
            raise ValueError(f"start {self.start} is outside an epoch of {self.steps} steps")

    @property
    def steps(self) -> int:
        """The steps of the whole epoch, whatever ``start`` is."""
        return steps_per_epoch(len(self.order), self.replicas * self.batch)

    def __len__(self) -> int:
        """The steps that are left."""
        return self.steps - self.start

    def at(self, step: int) -> Batch:
        """The batch of one step, made now."""
        size = self.replicas * self.batch
        samples = self.order[step * size : (step + 1) * size]
        with trace.span("images", batch=step):
            shards = [self._shard(samples[v * self.batch : (v + 1) * self.batch]) for v in self.local]
        return Batch(step, shards, len(samples))

    def _shard(self, indices: np.ndarray) -> Shard:
        images = self.split.take(indices)
        return Shard(images, self.split.labels[indices], indices, self.draw(indices, images) if self.draw else None)

    def __iter__(self) -> Iterator[Batch]:
        pool, ahead = ThreadPoolExecutor(1, "dpresnet-prefetch"), deque()

        def first() -> Batch:
            with trace.span("wait for images"):
                return ahead.popleft().result()

        try:
            for step in range(self.start, self.steps):
                ahead.append(pool.submit(self.at, step))
                if len(ahead) > self.ahead:
                    yield first()
            while ahead:
                yield first()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, eq=False)
class _SyntheticSplit:
    """A Split whose images are made when they are taken: the coarse pattern of the class plus a window of shared noise.

    Two samples of a class differ by where their windows start, ``shifts`` int64 [N]. So memory does not grow with the
    number of samples, and taking one costs little more than copying it.
    """

    patterns: np.ndarray  # uint8 [classes, C, _GRID, _GRID]
    noise: np.ndarray  # uint8 [C*H*W + _SHIFTS]
    shifts: np.ndarray
    labels: np.ndarray
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The images at ``indices`` int64 [n]: uint8 [n, C, H, W]."""
        cells = np.arange(self.shape[-1]) * _GRID // self.shape[-1]
        images = self.patterns[self.labels[indices]][:, :, cells[:, None], cells]
        for image, shift in zip(images, self.shifts[indices], strict=True):
            image += self.noise[shift : shift + image.size].reshape(self.shape)
        return images


def _synthetic(seed: int, image: int, channels: int, classes: int) -> Dataset:
    """Balanced classes that a small network tells apart, for trying out shapes and speeds without any files."""
    shape, samples = (channels, image, image), _SYNTHETIC_TRAIN + _SYNTHETIC_TEST
    patterns = _random_levels((classes, channels, _GRID, _GRID), _PATTERN_LEVELS, (seed, 0))
    noise = _random_levels((prod(shape) + _SHIFTS,), _NOISE_LEVELS, (seed, 1))
    shifts = (_random_bits(samples, (seed, 2)) % _SHIFTS).astype(np.int64)
    labels = np.arange(samples, dtype=np.int32) % classes
    measured = min(_MEASURED, 1 + _MEASURED_BYTES // prod(shape))
    bounds = (0, _SYNTHETIC_TRAIN), (_SYNTHETIC_TRAIN, samples)
    train, test = (_SyntheticSplit(patterns, noise, shifts[a:b], labels[a:b], shape) for a, b in bounds)
    content = f"synthetic version 1: seed {seed}, {image} pixels, {channels} channels, {classes} classes"
    return Dataset(
        "synthetic",
        "made by dpresnet",
        "none needed",
        tuple(f"class {k}" for k in range(classes)),
        *schema.statistics(train.take(np.arange(measured))),
        hashlib.sha256(content.encode()).hexdigest(),
        train,
        test,
    )


def _random_levels(shape: tuple[int, ...], levels: int, key: tuple[int, int]) -> np.ndarray:
    """Uniform integers in 0..levels-1, uint8, from 64 random bits for every eight."""
    count = prod(shape)
    octets = _random_bits(-(-count // 8), key).astype("<u8").view(np.uint8)[:count]
    return (octets.astype(np.uint16) * levels >> 8).astype(np.uint8).reshape(shape)
