"""Makes a data set file from data in other formats:  python -m dpresnet.datasets.prepare KIND SOURCE OUT.h5

README.md in this folder says what each KIND reads, and what is refused.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from dpresnet.commandline import Parser
from dpresnet.datasets import arrays, cifar, folder, idx, schema
from dpresnet.datasets.content import Content
from dpresnet.datasets.images import Shaping
from dpresnet.environment import usable_cores
from dpresnet.errors import Refused, exit_code

INTERRUPTED = 130  # as a shell reports Ctrl-C
SHOWN = 5  # skipped files


def parser() -> argparse.ArgumentParser:
    """The flags: a command for each kind."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("source", metavar="SOURCE", type=Path, help="what to read")
    common.add_argument("out", metavar="OUT.h5", type=Path, help="what to write")
    common.add_argument("--name", help="what the data set is called (the name of OUT)")
    common.add_argument("--licence", help="under which terms it comes (those of the kind)")
    common.add_argument("--class-names", metavar="A,B,..|FILE", help="names of the classes, in order; FILE: one a line")
    common.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    flags = Parser(prog="python -m dpresnet.datasets.prepare", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    kinds = flags.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind in idx.KNOWN:
        kinds.add_parser(kind, parents=[common], help="a folder with its four files, gzipped or not")
    for kind in cifar.KNOWN:
        kinds.add_parser(kind, parents=[common], help="the .tar.gz or its folder, binary or Python version")
    _add_folder(kinds.add_parser("imagefolder", parents=[common], help="SPLIT/CLASS/*.jpg, .jpeg, .png, .webp: folder or zip"))
    _add_numpy(kinds.add_parser("numpy", parents=[common], help="an .npz file of images and labels"))
    return flags


def _add_numpy(command: argparse.ArgumentParser) -> None:
    command.add_argument("--layout", choices=arrays.LAYOUTS, default="",
                         help="what the dimensions of images are (guessed where it is clear)")  # fmt: skip
    _add_fraction(command)


def _add_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: grey, 3: colours (3)")
    command.add_argument("--size", type=_positive, default=0, metavar="N", help="N x N pixels (those that all images have)")
    command.add_argument("--fit", choices=("shorter", "fixed"), default="shorter", help="how: the shorter side becomes N, then "
                         "the centre square; or the whole image is squeezed (shorter)")  # fmt: skip
    _add_fraction(command)
    command.add_argument("--test-split", choices=folder.TEST, default="", help="which of several splits is for testing")
    command.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used, and list them in "
                         "OUT.h5.skipped.txt")  # fmt: skip
    command.add_argument("--max-pixels", type=_positive, default=Shaping.most_pixels, metavar="N",
                         help=f"larger images are not decoded ({Shaping.most_pixels:,})")  # fmt: skip
    command.add_argument("--workers", type=_positive, default=usable_cores(), metavar="N",
                         help="threads that decode (cores)")  # fmt: skip


def _add_fraction(command: argparse.ArgumentParser) -> None:
    command.add_argument("--test-fraction", type=_fraction, default=0.0, metavar="X",
                         help="hold out this share of every class for testing, where there is no test split")  # fmt: skip


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def run(argv: Sequence[str] | None) -> None:
    """Reads, writes, and says what was made."""
    args = parser().parse_args(argv)
    _check_texts(args)
    _check_out(args.out, args.overwrite)
    names = _given_names(args.class_names)
    try:
        with _content(args, names) as content:
            dataset = _dataset(content, args, names)
            schema.write(args.out, dataset)
            _leave_list(Path(f"{args.out}.skipped.txt"), content.skipped)
    except OSError as error:
        raise Refused(f"{args.out} cannot be made: {' '.join(str(error).split())}") from None
    for note in content.notes:
        print(note)
    shape = " x ".join(map(str, dataset.shape))
    print(f"{args.out}: {len(dataset.train)} + {len(dataset.test)} images (train + test), {dataset.classes} classes, {shape}, "
          f"{args.out.stat().st_size:,} bytes, fingerprint {dataset.fingerprint}")  # fmt: skip


def _check_texts(args: argparse.Namespace) -> None:
    """Refused for what a file cannot hold as text: bytes of the command line that are none."""
    for flag in ("name", "licence", "class_names"):
        value = getattr(args, flag) or ""
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise Refused(f"--{flag.replace('_', '-')} {value!r} is not UTF-8: give a text that is")


def _check_out(out: Path, overwrite: bool) -> None:
    """Refused at once if the file could not be written after hours of decoding."""
    if out.suffix not in (".h5", ".hdf5"):
        raise Refused(f"{out} is not the name of a data set file: give one that ends in .h5")
    if out.is_dir() or (out.exists() and not overwrite):
        raise Refused(f"{out} exists: give another name{'' if out.is_dir() else ', or --overwrite'}")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise Refused(f"{out} cannot be written: {out.parent} is no folder that you can write to")


def _given_names(text: str | None) -> tuple[str, ...]:
    """The names of --class-names; none if it was not given."""
    if text is None:
        return ()
    try:
        lines = Path(text).read_text().splitlines() if Path(text).is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--class-names {text!r} cannot be read: {error}") from None
    names = tuple(filter(None, (line.strip() for line in lines)))
    if not names or len(set(names)) < len(names):
        raise Refused(f"--class-names {text!r} is not a list of different names: give a name for each class")
    return names


def _content(args: argparse.Namespace, names: tuple[str, ...]) -> AbstractContextManager[Content]:
    """What the reader of the kind finds."""
    if args.kind in idx.KNOWN:
        return nullcontext(idx.read(args.kind, args.source))
    if args.kind in cifar.KNOWN:
        return nullcontext(cifar.read(args.kind, args.source))
    if args.kind == "numpy":
        return nullcontext(arrays.read(args.source, args.layout, args.test_fraction, names))
    shaping = Shaping(args.channels, args.size, args.fit, args.max_pixels)
    options = folder.Options(shaping, args.test_fraction, args.test_split, args.skip_bad, args.workers)
    return folder.reading(args.source, Path(f"{args.out}.partial"), options)


def _dataset(content: Content, args: argparse.Namespace, names: tuple[str, ...]) -> schema.Dataset:
    """What is written, with the names that were given instead of those of the content."""
    if names and len(names) != len(content.class_names):
        count = len(content.class_names)
        raise Refused(f"--class-names gives {len(names)} names, {args.source} has {count} classes: give as many")
    licence = content.licence if args.licence is None else args.licence
    name = args.out.stem if args.name is None else args.name
    return schema.assemble(name, content.source, licence, names or content.class_names, content.train, content.test)


def _leave_list(path: Path, skipped: Sequence[str]) -> None:
    """All skipped files into a file, which goes if there are none, and the first ones to the terminal."""
    path.unlink(missing_ok=True)
    if skipped:
        path.write_text("".join(f"{line}\n" for line in skipped), encoding="utf-8")
        print(f"skipped {len(skipped)} files, all listed in {path}:", *skipped[:SHOWN], sep="\n  ")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of what was refused, with one line on stderr; 130 after Ctrl-C."""
    try:
        return exit_code(lambda: run(argv))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is missing", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
