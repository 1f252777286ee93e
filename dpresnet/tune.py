"""Measures on this device which tile sizes are fastest for the convolutions of a network, and keeps them for later runs.

    python -m dpresnet.tune --arch resnet50 --image 224 --batch 8 --precision fp16

Bits do not depend on it: results are the same with every file and without one. The file is $DPRESNET_TUNED, or
dpresnet/tuned.json in $XDG_CACHE_HOME or ~/.cache; an empty DPRESNET_TUNED turns it off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpresnet import environment, tiles
from dpresnet.bench.facts import table
from dpresnet.bench.flags import add_workload, positive, workload
from dpresnet.bench.workload import Workload
from dpresnet.errors import Refused, exit_code

CANNOT = f"cannot be written ({{}}): set {tiles.VARIABLE} to another path"


def parser() -> argparse.ArgumentParser:
    """The flags."""
    usual = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser(prog="python -m dpresnet.tune", description=__doc__, formatter_class=usual)
    add_workload(flags, 32)
    flags.add_argument("--infer", action="store_true", help="only what evaluation launches")
    flags.add_argument("--rounds", type=positive, default=5, help="turns of all candidates of a launch (5)")
    flags.add_argument("--dry-run", action="store_true", help="measure and print, but leave the file as it is")
    flags.add_argument("--show", action="store_true", help="print what the file holds, and measure nothing")
    return flags


def file_to_write() -> Path:
    """Where the winners go; Refused at once if they could not be written after minutes of measuring."""
    file = tiles.place()
    if file is None:
        raise Refused(f"there is no place for the file: set {tiles.VARIABLE} to a path, or leave --dry-run to only look")
    held(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{file} {CANNOT.format(error.strerror)}") from None
    if not environment.writable(file.parent):
        raise Refused(f"{file} {CANNOT.format('its folder is not yours')}")
    return file


def held(file: Path) -> dict[str, Any]:
    """What the file holds."""
    try:
        return tiles.read(file)
    except tiles.Foreign as error:
        raise Refused(f"{file}: {error}: remove it, or set {tiles.VARIABLE} to another path") from None


def show() -> str:
    """The file as text: devices, and a line for each launch."""
    file = tiles.place()
    devices = held(file) if file else {}
    if not devices:
        return f"nothing is tuned ({file or f'{tiles.VARIABLE} is empty'})"
    lines = [str(file)]
    for device, found in devices.items():
        lines += ["", f"{device}, kernels {found['kernels']}: {len(found['sizes'])} launches"]
        lines += [f"  {key:80s} {size_text(sizes)}" for key, sizes in found["sizes"].items()]
    return "\n".join(lines)


def size_text(sizes: tiles.Sizes) -> str:
    """Names and numbers."""
    return ", ".join(f"{name} {value}" for name, value in asdict(sizes).items())


def measure(work: Workload, rounds: int) -> tuple[Any, list]:
    """The device, and what was found for each launch of the network. Loads OpenCL. Ctrl-C ends it early."""
    environment.prepare(work.threads, 0, 1)
    from dpresnet import tuning
    from dpresnet.device import Device, choose_device
    from dpresnet.resnet import Options

    device = Device(choose_device(work.device), profile=True, vector=work.vector)
    options = Options(work.classes, work.stem)
    tasks = tuning.tasks_of(device, work.arch, options, work.image, work.batch, work.precision, work.infer)
    print(f"{work.pass_name}: {work}\n{device.tuning_name}: {len(tasks)} launches to measure", flush=True)
    found = []
    try:
        for result in tqdm(tuning.tune(device, tasks, rounds), total=len(tasks), unit="launch", leave=False, disable=None):
            found.append(result)
    except KeyboardInterrupt:
        print(f"stopped after {len(found)} of {len(tasks)}", file=sys.stderr)
    return device, found


def report(found: list) -> str:
    """The table, and its sum: every launch counted once, however often the network has it."""
    if not found:
        return "nothing was measured: the kernels of this device have no sizes, or it was stopped before"
    rows = [cells(f) for f in sorted(found, key=lambda f: f.chosen_s - f.shipped_s)]
    shipped, chosen = (1e3 * sum(getattr(f, name) for f in found) for name in ("shipped_s", "chosen_s"))
    rows.append(("sum", f"{shipped:.3f}", f"{chosen:.3f}", f"{1 - chosen / shipped:.1%}", str(sum(f.tried for f in found)), ""))
    return table(("launch", "shipped ms", "chosen ms", "gain", "tried", "sizes that differ"), rows)


def cells(found: Any) -> tuple[str, ...]:
    """A row of the table."""
    changes = [f.name for f in fields(found.chosen) if getattr(found.chosen, f.name) != getattr(found.shipped, f.name)]
    texts = [f"{name} {getattr(found.shipped, name)} -> {getattr(found.chosen, name)}" for name in changes]
    return (found.task.key, f"{1e3 * found.shipped_s:.3f}", f"{1e3 * found.chosen_s:.3f}", f"{found.gain:.1%}",
            str(found.tried), ", ".join(texts))  # fmt: skip


def run(argv: Sequence[str] | None) -> None:
    """Checks, measures, prints, writes."""
    args = parser().parse_args(argv)
    if args.show:
        print(show())
        return
    file = None if args.dry_run else file_to_write()
    work = workload(args)
    device, found = measure(work, args.rounds)
    print(report(found))
    if file and found:
        print(written(file, device, {f.task.key: f.better for f in found}))


def written(file: Path, device: Any, winners: dict[str, tiles.Sizes | None]) -> str:
    """Writes the file; says so."""
    from dpresnet.device import tuned_kernels

    try:
        entries = tiles.write(file, device.tuning_name, tuned_kernels(), winners)
    except OSError as error:
        raise Refused(f"{file} {CANNOT.format(error.strerror)}") from None
    better = sum(sizes is not None for sizes in winners.values())
    return f"{better} of {len(winners)} launches are faster with other sizes -> {file} ({entries} launches of this device)"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of what was refused, with one line on stderr."""
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
