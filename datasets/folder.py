"""Images in folders, or in a zip file of them: SPLIT/CLASS/NAME.jpg, .jpeg, .png or .webp."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dpresnet.datasets.content import NOT_STATED, Content, Rows, held_out
from dpresnet.datasets.images import FORMATS, Shaping, Unusable, decode, pillow, suffix
from dpresnet.datasets.schema import Split
from dpresnet.datasets.sources import File, Folder, Zip, open_source, shown
from dpresnet.datasets.staging import Staging
from dpresnet.errors import Refused

TRAIN, TEST = "train", ("test", "val", "valid", "validation")
PLACE = "an image belongs in SPLIT/CLASS/"
COMMIT_BYTES = 1 << 24  # of pixels, which a power cut may cost
TOGETHER = 16  # images that a thread decodes in one go


@dataclass(frozen=True)
class Options:
    """How to read: ``test_fraction`` 0 for a source with a test split, ``test_split`` "" for the only one there is."""

    shaping: Shaping
    test_fraction: float = 0.0
    test_split: str = ""
    skip_bad: bool = False
    workers: int = 1


@dataclass(frozen=True)
class Listing:
    """The images of a source: ``train`` and ``test`` sorted by path, with the number of the class of each; ``faults`` are
    (path, reason) of those that cannot be used, ``passed`` counts the files that are no images by their kind.
    """

    files: list[File]
    labels: list[int]
    test: np.ndarray  # bool [N]
    class_names: tuple[str, ...]
    faults: list[tuple[str, str]]
    passed: Counter[str]


@contextmanager
def reading(source: Path, scratch: Path, options: Options) -> Iterator[Content]:
    """The images of a folder or zip file. Decoded ones are kept in the folder ``scratch``, which goes at the end unless that is
    an exception: then the next time goes on with what is missing.
    """
    version = pillow().__version__
    with closing(open_source(source)) as opened:
        listing = arrange(opened.files(), source, options)
        if listing.faults and not options.skip_bad:
            _refuse(source, *listing.faults[0])
        plan = json.dumps([version, astuple(options.shaping), [astuple(file) for file in listing.files]])
        staging, done = Staging(scratch, hashlib.sha256(plan.encode()).hexdigest(), len(listing.files)), False
        try:
            faults = _decode(opened, source, listing, staging, options)
            yield _found(source, listing, staging, faults)
            done = True
        finally:
            staging.close(remove=done)


def _found(source: Path, listing: Listing, staging: Staging, faults: dict[int, str]) -> Content:
    usable = np.ones(len(listing.files), bool)
    usable[list(faults)] = False
    _check_classes(source, listing, usable)
    train, test = (_split(staging, listing, usable & chosen) for chosen in (~listing.test, listing.test))
    skipped = sorted([*listing.faults, *((listing.files[i].path, reason) for i, reason in faults.items())])
    notes = (_passed_over(listing.passed),) if listing.passed else ()
    lines = tuple(f"{shown(path)}: {reason}" for path, reason in skipped)
    return Content(train, test, listing.class_names, f"images of {source.resolve().name}", NOT_STATED, notes, lines)


def _refuse(source: Path, path: str, reason: str) -> None:
    raise Refused(f"{source}: {shown(path)}: {reason}: repair or remove it, or leave out all such files by --skip-bad")


# What there is


def arrange(files: list[File], source: Path, options: Options) -> Listing:
    """Which files are which samples. Refused where the splits or the classes are not clear."""
    images, passed = _images(files)
    top = _enclosing(images)
    splits: dict[str, list[tuple[str, File]]] = {TRAIN: [], **{name: [] for name in TEST}}
    faults = []
    for file in images:
        parts = file.path.removeprefix(top).split("/")
        if file.fault:
            faults.append((file.path, file.fault))
        elif len(parts) != 3 or parts[0] not in splits:
            faults.append((file.path, f"{PLACE}, with SPLIT train or one of {', '.join(TEST)}"))
        else:
            splits[parts[0]].append((parts[1], file))
    if not splits[TRAIN]:
        found = sorted({shown(file.path.split("/")[0]) for file in images}) or ["nothing"]
        raise Refused(f"{source} has no images in train/CLASS/, only in {', '.join(found[:5])}: {PLACE}")
    test = _test_split({name: splits[name] for name in TEST if splits[name]}, source, options)
    passed.update({f"of {name}": len(splits[name]) for name in TEST if splits[name] and splits[name] is not test})
    names = _class_names(splits[TRAIN], test, source)
    numbers = {name: number for number, name in enumerate(names)}
    samples = [*splits[TRAIN], *test]
    labels = [numbers[name] for name, _ in samples]
    for_test = np.arange(len(samples)) >= len(splits[TRAIN])
    if options.test_fraction:
        keys = ("/".join(file.path.split("/")[-2:]).encode(errors="surrogateescape") for _, file in samples)
        for_test = held_out(keys, labels, names, options.test_fraction)
    return Listing([file for _, file in samples], labels, for_test, names, faults, passed)


def _images(files: list[File]) -> tuple[list[File], Counter[str]]:
    """The images by name, and how many others there are of each kind. Hidden files are others,
    such as those that macOS adds to zip files.
    """
    images, passed = [], Counter()
    for file in files:
        parts = file.path.split("/")
        if suffix(parts[-1]) in FORMATS and not any(part.startswith(".") for part in parts):
            images.append(file)
        else:
            passed[f".{suffix(parts[-1])}" if suffix(parts[-1]) else parts[-1]] += 1
    return images, passed


def _enclosing(images: list[File]) -> str:
    """The folder that all splits lie in, with its "/", or ""."""
    paths = [file.path.split("/") for file in images]
    tops = {parts[0] for parts in paths}
    return f"{tops.pop()}/" if len(tops) == 1 and any(len(p) == 4 and p[1] == TRAIN for p in paths) else ""


def _test_split(found: dict[str, list], source: Path, options: Options) -> list[tuple[str, File]]:
    """The samples of the test split: none if a part of the training split is to be held out."""
    if options.test_split:
        if options.test_split not in found:
            raise Refused(f"--test-split {options.test_split}: {source} has no images in {options.test_split}/CLASS/")
        return found[options.test_split]
    if options.test_fraction and found:
        there = next(iter(found))
        raise Refused(f"--test-fraction {options.test_fraction}: {source} has the split {there} already: leave the flag out")
    if not found and not options.test_fraction:
        raise Refused(f"{source} has no test split ({', '.join(TEST)}): --test-fraction 0.1 holds out a tenth of every class")
    if len(found) > 1:
        raise Refused(f"{source} has the splits {' and '.join(found)}: say which is to be the test split by --test-split NAME")
    return next(iter(found.values()), [])


def _class_names(train: list[tuple[str, File]], test: list[tuple[str, File]], source: Path) -> tuple[str, ...]:
    names = sorted({name for name, _ in train})
    for name, file in test:
        if name not in names:
            raise Refused(f"{source}: {shown(file.path)} is of class {name!r}, which train lacks: add some, or remove it")
    for name in names:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise Refused(f"{source}: the name of the class folder {name!r} is not UTF-8: rename it")
    return tuple(names)


# Decoding


def _decode(opened: Folder | Zip, source: Path, listing: Listing, staging: Staging, options: Options) -> dict[int, str]:
    """Fills the staging; returns which images could not be used, and why. Without ``skip_bad`` the first is Refused."""
    if staging.foreign:
        print(f"{staging.folder} holds images of another listing or other options: starting anew", file=sys.stderr)
    if staging.shape is None:
        staging.begin(_shape(opened, source, listing.files, options))
    elif done := staging.count - len(staging.missing):
        print(f"{staging.folder} holds {done} of {staging.count} images: going on from there", file=sys.stderr)
    faults, stored = {}, []
    limit = max(1, COMMIT_BYTES // int(np.prod(staging.shape)))
    with tqdm(total=staging.count, initial=staging.count - len(staging.missing), unit="image", disable=None) as bar:
        try:
            for done, bad in _in_threads(opened, source, listing.files, staging, options):
                stored += done
                for number, reason in bad.items():
                    if not options.skip_bad:
                        _refuse(source, listing.files[number].path, reason)
                    faults[number] = reason
                bar.update(len(done) + len(bad))
                if len(stored) >= limit:
                    staging.commit(stored)
                    stored = []
        finally:
            staging.commit(stored)
    return faults


def _shape(opened: Folder | Zip, source: Path, files: list[File], options: Options) -> tuple[int, int, int]:
    """(C, H, W) of all images, which the first one that can be used says if no option does."""
    shaping = options.shaping
    if shaping.size:
        return shaping.channels, shaping.size, shaping.size
    for file in files:
        try:
            return decode(opened.read(file, shaping.most_bytes), file.path, shaping).shape
        except Unusable as error:
            if not options.skip_bad:
                _refuse(source, file.path, str(error))
    raise Refused(f"{source}: none of its {len(files)} images can be used")


def _in_threads(
    opened: Folder | Zip, source: Path, files: list[File], staging: Staging, options: Options
) -> Iterator[tuple[list[int], dict[int, str]]]:
    """Decodes what is missing into the staging, in order; yields which images have been stored, and the faults of others."""
    most_bytes, shaping = options.shaping.most_bytes, options.shaping

    def work(numbers: list[int]) -> tuple[list[int], dict[int, str]]:
        done, faults = [], {}
        for number in numbers:
            file = files[number]
            try:
                pixels = decode(opened.read(file, most_bytes), file.path, shaping)
            except Unusable as error:
                faults[number] = str(error)
                continue
            if pixels.shape != staging.shape:
                (_, h, w), (_, height, width) = pixels.shape, staging.shape
                raise Refused(f"{source}: {shown(file.path)} has {w} x {h} pixels, those before it have {width} x {height}: "
                              "give the size that all are to have, such as --size 224")  # fmt: skip
            staging.images[number] = pixels
            done.append(number)
        return done, faults

    missing = staging.missing.tolist()
    pool, ahead = ThreadPoolExecutor(options.workers, "dpresnet-decode"), deque()
    try:
        for first in range(0, len(missing), TOGETHER):
            ahead.append(pool.submit(work, missing[first : first + TOGETHER]))
            if len(ahead) > 2 * options.workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# What comes out


def _check_classes(source: Path, listing: Listing, usable: np.ndarray) -> None:
    labels = np.array(listing.labels)
    counts = np.bincount(labels[usable & ~listing.test], minlength=len(listing.class_names))
    if (counts == 0).any():
        name = listing.class_names[int(np.argmin(counts))]
        raise Refused(f"{source}: no image of class {name!r} can be used for training: add some, or remove the class")
    if not (usable & listing.test).any():
        raise Refused(f"{source}: no image of the test split can be used: add some")


def _split(staging: Staging, listing: Listing, chosen: np.ndarray) -> Split:
    samples = np.flatnonzero(chosen)
    return Split(Rows(staging.images, samples), np.array(listing.labels, np.int32)[samples])


def _passed_over(passed: Counter[str]) -> str:
    listed = ", ".join(f"{shown(kind)} {count}" for kind, count in passed.most_common(5))
    return f"passed over {passed.total()} files that are no images by name, or of another split: {listed}"
