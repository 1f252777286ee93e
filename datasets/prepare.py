"""``python -m dpresnet.datasets.prepare KIND SOURCE OUT.h5``: makes a data set file of images in any of the usual forms.

The same source and options give the same bytes, whoever decodes and however often that was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dpresnet.datasets import arrays, cifar, folder, idx, pictures, schema
from dpresnet.datasets.pictures import FITS, BadPicture
from dpresnet.datasets.schema import Dataset, Split
from dpresnet.datasets.staging import Staging
from dpresnet.errors import Refused, exit_code

KINDS = (*idx.CLASS_NAMES, *cifar.VERSIONS, "imagefolder", "numpy")
SHOWN = 10  # bad files that are listed on the terminal


def prepare(args: argparse.Namespace) -> Dataset:
    """Reads the source and writes the file; Refused for what cannot be used, before anything is written under its name."""
    if args.kind == "imagefolder":
        return of_folder(args)
    names: tuple[str, ...] = ()
    if args.kind in idx.CLASS_NAMES:
        names, splits = idx.CLASS_NAMES[args.kind], idx.read(args.source)
    elif args.kind in cifar.VERSIONS:
        names, splits = cifar.read(args.kind, args.source)
    else:
        splits = arrays.read(args.source, args.layout or "", args.test_fraction)
        names = tuple(f"class {k}" for k in range(1 + max(int(split.labels.max()) for split in splits.values())))
    return written(args, names, splits)


def written(args: argparse.Namespace, names: tuple[str, ...], splits: dict[str, Split]) -> Dataset:
    """The data set, when its file is whole."""
    names = class_names(args.class_names, names)
    source = args.name_of_source or f"{args.kind} {args.source.name}"
    try:
        dataset = schema.assemble(args.name or args.out.stem, source, args.licence, names, splits["train"], splits["test"])
        schema.write(args.out, dataset)
    except ValueError as error:
        raise Refused(f"{args.source}: {error}") from None
    except OSError as error:
        raise Refused(f"{args.out} cannot be written: {error.strerror or error}") from None
    return dataset


def class_names(given: str, found: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the source, or those of ``--class-names``: a file with a line for each, or joined by commas."""
    if not given:
        return found
    lines = Path(given).read_text(encoding="utf-8").splitlines() if Path(given).is_file() else given.split(",")
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != len(found):
        raise Refused(f"--class-names {given}: {len(names)} names for {len(found)} classes")
    return names


# Folders of image files


def of_folder(args: argparse.Namespace) -> Dataset:
    """Decodes into a staging folder beside the file, from which an interrupted run goes on."""
    pictures.check()
    store = folder.open_store(args.source)
    found = folder.listing(store, args.test_fraction)
    report = Bad(args)
    for path, reason in found.bad:
        report.add(path, reason)
    read = partial(decoded, args, store)
    shape = (args.channels, args.size, args.size) if args.size else first_shape(found, read)
    options = (args.channels, args.size, args.fit, args.max_pixels, schema.VERSION)
    key = hashlib.sha256(f"{found.digest} {options}".encode()).hexdigest()
    counts = {split: len(items) for split, items in found.items.items()}
    staging = Staging(args.out.with_name(args.out.name + ".staging"), key, shape, counts)
    if staging.resumed:
        print(f"{staging.resumed} images were decoded before", file=sys.stderr)
    fill(args, found, staging, read, report)
    splits = {}
    for split, items in found.items.items():
        images, chosen = staging.good(split)
        if not len(chosen):
            raise Refused(f"{args.source}: no image of the {split} split can be used")
        splits[split] = Split(images, np.array([items[index].label for index in chosen], np.int32))
    dataset = written(args, found.class_names, splits)
    report.finish(found.passed_over)
    staging.remove()
    return dataset


def decoded(args: argparse.Namespace, store: folder.Store, entry: folder.Entry) -> np.ndarray:
    """An image of the source, uint8 [C, H, W]."""
    return pictures.decode(store.read(entry), entry.path, args.channels, args.size, args.fit, args.max_pixels)


def first_shape(found: folder.Listing, read: partial) -> tuple[int, int, int]:
    """That of the first image which can be decoded: without --size all must have it."""
    for item in found.items["train"]:
        try:
            return read(item.entry).shape
        except BadPicture:
            continue
    raise Refused("no image of the train split can be decoded")


def fill(args: argparse.Namespace, found: folder.Listing, staging: Staging, read: partial, report: Bad) -> None:
    """Decodes all images that are not there yet."""
    from tqdm import tqdm

    shape, total = staging.images["train"].shape[1:], sum(map(len, found.items.values()))
    with tqdm(total=total, initial=staging.resumed, unit="image", disable=None) as bar:
        for split, items in found.items.items():

            def one(index: int, items: list[folder.Item] = items) -> np.ndarray:
                image = read(items[index].entry)
                if image.shape != shape:
                    raise BadPicture(f"has {image.shape[2]} x {image.shape[1]} pixels, others {shape[2]} x {shape[1]}: "
                                     "--size N makes all alike")  # fmt: skip
                return image

            for index, reason in staging.fill(split, one, args.workers):
                bar.update()
                if reason:
                    report.add(items[index].entry.path, reason)


class Bad:
    """Files that cannot be used: the first is refused, or with --skip-bad all are listed."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._found = args, []

    def add(self, path: str, reason: str) -> None:
        """One of them."""
        if not self._args.skip_bad:
            raise Refused(f"{self._args.source}: {path} {reason}; --skip-bad leaves such files out")
        self._found.append(f"{path} {reason}")

    def finish(self, passed_over: int) -> None:
        """Says how many there were, and which."""
        if passed_over:
            print(f"{passed_over} files that are no images by their names were passed over", file=sys.stderr)
        if not self._found:
            return
        path = self._args.out.with_name(self._args.out.name + ".skipped.txt")
        path.write_text("".join(f"{line}\n" for line in sorted(self._found)), encoding="utf-8")
        listed = "".join(f"\n  {line}" for line in sorted(self._found)[:SHOWN])
        print(f"{len(self._found)} bad files were left out, all of them in {path}:{listed}", file=sys.stderr)


# The program


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = __doc__.split("\n\n")[0].split(": ", 1)[1]
    command = argparse.ArgumentParser(prog="python -m dpresnet.datasets.prepare", description=text, allow_abbrev=False)
    command.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    command.add_argument("source", type=Path, metavar="SOURCE", help="folder or archive, see datasets/README.md")
    command.add_argument("out", type=Path, metavar="OUT.h5", help="file to make")
    command.add_argument("--name", default="", help="of the data set (that of the file)")
    command.add_argument("--origin", dest="name_of_source", default="", metavar="TEXT", help="where it is from")
    command.add_argument("--licence", default="unknown: see where the images are from", metavar="TEXT", help="(unknown)")
    command.add_argument("--class-names", default="", metavar="A,B,..|FILE", help="instead of those of the source")
    command.add_argument("--overwrite", action="store_true", help="replace OUT.h5")
    command.add_argument("--test-fraction", type=share, default=0.0, metavar="X", help="hold out a test split from train")
    command.add_argument("--layout", choices=arrays.LAYOUTS, help="numpy: what follows N in the arrays (what fits)")
    images = command.add_argument_group("imagefolder")
    images.add_argument("--size", type=at_least(0), default=0, metavar="N", help="make all images N x N (0: they are alike)")
    images.add_argument("--fit", choices=FITS, default="shorter",
                        help="how: scale the shorter side and cut the middle out, or scale both sides (shorter)")  # fmt: skip
    images.add_argument("--channels", type=int, choices=(1, 3), default=3, help="grey or colour (3)")
    images.add_argument("--skip-bad", action="store_true", help="leave files out that cannot be used, and list them")
    images.add_argument("--max-pixels", type=at_least(1), default=pictures.MOST_PIXELS, metavar="N",
                        help=f"of an image before it is scaled ({pictures.MOST_PIXELS})")  # fmt: skip
    images.add_argument("--workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N",
                        help="threads that decode (one for each core)")  # fmt: skip
    return command


def at_least(least: int):
    """A whole number for argparse."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def share(text: str) -> float:
    """A share for argparse."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def run(args: argparse.Namespace) -> None:
    """Makes the file and says what is in it."""
    if args.out.exists() and not args.overwrite:
        raise Refused(f"{args.out} exists: --overwrite replaces it")
    if not args.out.resolve().parent.is_dir():
        raise Refused(f"{args.out}: there is no folder {args.out.resolve().parent}: create it first")
    dataset = prepare(args)
    facts = {"train": len(dataset.train), "test": len(dataset.test), "classes": dataset.classes, "shape": list(dataset.shape),
             "bytes": args.out.stat().st_size, "fingerprint": dataset.fingerprint}  # fmt: skip
    print(f"{args.out}: {json.dumps(facts)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 78 for what was refused."""
    return exit_code(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
