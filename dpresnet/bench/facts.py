"""Where and when figures were taken: machine, versions, commit. And what else a report consists of: tables and JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dpresnet import __version__, environment
from dpresnet.bench.workload import Facts
from dpresnet.errors import Refused

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "pyopencl", "pocl-binary-distribution", "torch")


def gather(args: Namespace) -> Facts:
    """Everything about a measurement but its results."""
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "arguments": {name: value if isinstance(value, int | float) else str(value) for name, value in vars(args).items()},
    }


def machine() -> Facts:
    """CPU, usable cores, caches of one core in bytes (shared ones whole), main memory in bytes."""
    return {
        "cpu": cpu_model(),
        "cores": environment.usable_cores(),
        "caches": caches(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def cpu_model() -> str:
    """The name that the processor gives itself."""
    try:
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Bytes of each cache that the first core uses, by name: L1d, L1i, L2, L3. Empty where the system does not tell."""
    found = {}
    for index in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        found[f"L{level}{suffix}"] = int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
    return found


def versions() -> dict[str, str]:
    """Python, this package, and the libraries that figures depend on, as far as they are installed."""
    found = {"python": platform.python_version(), "dpresnet": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """What git calls the checkout, with "-dirty" if tracked files differ; None for an installed package."""
    if not (CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--tags", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(samples), "least": min(samples), "most": max(samples)}


def heading(facts: Facts) -> str:
    """Machine, versions and commit in two lines."""
    box, sizes = facts["machine"], facts["machine"]["caches"]
    levels = ", ".join(f"{name} {size >> 10} KiB" for name, size in sizes.items() if not name.endswith("i"))
    libraries = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (f"{facts['date']}, commit {facts['commit'] or 'none (installed package)'}, {box['cpu']}, {box['cores']} cores"
            f"{', ' if levels else ''}{levels}\n{libraries}")  # fmt: skip


def tuned_text(tuned: Facts | None) -> str:
    """Whose tile sizes the kernels have, in one line."""
    if not tuned or not tuned["entries"]:
        return "tile sizes: as shipped"
    return f"tile sizes: measured on this device for {tuned['entries']} launches ({tuned['file']}), otherwise as shipped"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, all others to the right."""
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    first, *others = widths
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))]).rstrip()
        for row in (titles, *rows)
    )


def check_folder(path: Path | None, flag: str) -> None:
    """Refuses a file that could not be written, before anything is measured."""
    if path and not path.resolve().parent.is_dir():
        raise Refused(f"{flag} {path}: there is no folder {path.resolve().parent}: create it first")


def write_json(path: Path, facts: Facts) -> None:
    """One object, indented."""
    path.write_text(json.dumps(facts, indent=1) + "\n")
