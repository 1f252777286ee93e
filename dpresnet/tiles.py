"""Sizes of the register tiles and work-groups of the convolution kernels: those shipped for a kind of device, and those that
`python -m dpresnet.tune` has measured on this one and keeps in a small file.

No size changes a bit of any result: the order of a sum follows from the shape of the convolution alone. So sizes may differ
between the ranks of a run and between a run and its continuation.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

FORMAT = 1  # of the file, and of what the fields of sizes mean
VARIABLE = "DPRESNET_TUNED"  # path of the file; empty: none
MOST_ROWS, MOST = 31, 2**20  # what a file may ask for


@dataclass(frozen=True)
class Sizes:
    """``rows`` is the height of a register tile: TILE_P or TILE_E of the kernel."""

    rows: int


@dataclass(frozen=True)
class DirectGather(Sizes):
    """conv_gather: a work-group computes at most ``pixels``, and fewer output tiles where there are not ``groups`` work-groups
    for each compute unit (with more of them, more of the patches overlap).
    """

    pixels: int
    groups: int


@dataclass(frozen=True)
class DirectWeight(Sizes):
    """conv_weight: a work-group takes ``pixels`` at a time, for ``panel`` output channels; for two or four times as many, and
    for twice as many input blocks of 1x1 weights, where that leaves ``groups`` work-groups for each compute unit.
    """

    pixels: int
    panel: int
    groups: int


@dataclass(frozen=True)
class WinogradGather(Sizes):
    """winograd_gather: a work-group takes ``tiles`` register tiles (twice as many where the weights come from memory),
    transforms ``chunk`` blocks of input channels at a time and multiplies them with ``panel`` output channels.
    """

    tiles: int
    chunk: int
    panel: int


@dataclass(frozen=True)
class WinogradWeight(Sizes):
    """winograd_weight: a work-group sums over ``tiles`` tiles at a time, between ``panel`` channels of either side."""

    tiles: int
    panel: int


KERNELS: dict[str, type[Sizes]] = {
    "conv_gather": DirectGather,
    "conv_weight": DirectWeight,
    "winograd_gather": WinogradGather,
    "winograd_weight": WinogradWeight,
}

# By lanes of a vector, kernel, and vectors of output channels of a register tile. Each row has as many vectors of accumulators;
# together with the weights that they are multiplied with they fill the registers at most: 32 of AVX-512, 16 of AVX2. What is
# best beyond that was measured, see "Tuning" in docs/performance.md.
SHIPPED: dict[int, dict[str, dict[int, Sizes]]] = {
    16: {
        "conv_gather": {1: DirectGather(16, 384, 4), 2: DirectGather(14, 384, 4)},
        "conv_weight": {1: DirectWeight(16, 128, 64, 4), 2: DirectWeight(8, 128, 64, 4)},
        "winograd_gather": {1: WinogradGather(16, 2, 4, 128), 2: WinogradGather(8, 2, 4, 128)},
        "winograd_weight": {1: WinogradWeight(16, 16, 64), 2: WinogradWeight(4, 16, 64)},
    },
    8: {
        "conv_gather": {1: DirectGather(12, 384, 4), 2: DirectGather(6, 384, 4)},
        "conv_weight": {1: DirectWeight(12, 128, 64, 4), 2: DirectWeight(6, 128, 64, 4)},
        "winograd_gather": {1: WinogradGather(12, 2, 4, 128), 2: WinogradGather(6, 2, 4, 128)},
        "winograd_weight": {1: WinogradWeight(12, 16, 64), 2: WinogradWeight(6, 16, 64)},
    },
    1: {  # GPUs: a work-item computes one element, without register tiles and local memory
        "conv_gather": dict.fromkeys((1, 2), DirectGather(1, 1, 1)),
        "conv_weight": dict.fromkeys((1, 2), DirectWeight(1, 1, 1, 1)),
    },
}

# The same for 1x1 windows, where others are better: by lanes, kernel, and vectors of output channels of a register tile.
SHIPPED_1X1: dict[int, dict[str, dict[int, Sizes]]] = {16: {"conv_gather": {2: DirectGather(7, 192, 4)}}}


def shipped(lanes: int, kernel: str, vectors: int, window: int) -> Sizes:
    """The sizes of a launch that has not been measured."""
    usual = SHIPPED[lanes][kernel][vectors]
    return SHIPPED_1X1.get(lanes, {}).get(kernel, {}).get(vectors, usual) if window == 1 else usual


@dataclass(frozen=True)
class Tuned:
    """Sizes by the keys of launches (`dpresnet.convolution.Conv.key`), and the file that they come from."""

    entries: Mapping[str, Sizes] = field(default_factory=dict)
    file: Path | None = None

    def find(self, conv: Any, kernel: str, transposed: bool) -> Sizes | None:
        """The sizes of a launch of ``kernel`` for a `Conv`; None if it has not been measured."""
        return self.entries.get(conv.key(kernel, transposed)) if self.entries else None

    def __str__(self) -> str:
        if not self.entries:
            return "shipped tile sizes; python -m dpresnet.tune measures those of a network"
        return f"tile sizes of {len(self.entries)} launches in {self.file}"

    @property
    def facts(self) -> dict[str, Any]:
        """For reports of measurements."""
        return {"file": str(self.file) if self.file else None, "entries": len(self.entries)}


SHIPPED_ONLY = Tuned()


class Foreign(ValueError):
    """The file is not one that this version of `dpresnet.tune` writes. The message says why."""


def place() -> Path | None:
    """The file: $DPRESNET_TUNED, else dpresnet/tuned.json in $XDG_CACHE_HOME or ~/.cache; None if there shall be none."""
    if (chosen := os.environ.get(VARIABLE)) is not None:
        return Path(chosen) if chosen else None
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base, "dpresnet", "tuned.json")
    home = os.environ.get("HOME")
    return Path(home, ".cache", "dpresnet", "tuned.json") if home else None


def tuned(device: str, kernels: str) -> Tuned:
    """What has been measured on a device, with kernels of this version. Reads the file once per process; a file that cannot
    be used, or entries for other kernels, are reported in one line on stderr, and the shipped sizes are used.
    """
    file = place()
    return _tuned(file, device, kernels) if file else SHIPPED_ONLY


@cache
def _tuned(file: Path, device: str, kernels: str) -> Tuned:
    try:
        found = read(file).get(device)
    except Foreign as error:
        warn(f"{file}: {error}; the shipped tile sizes are used: remove it, or set {VARIABLE} to another file")
        return SHIPPED_ONLY
    if found is None:
        return SHIPPED_ONLY
    if found["kernels"] != kernels:
        warn(f"{file}: measured with other kernels, the shipped tile sizes are used: run python -m dpresnet.tune again")
        return SHIPPED_ONLY
    return Tuned(found["sizes"], file)


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"warning: {text}", file=sys.stderr)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """By device: {"kernels": their digest, "sizes": {key: Sizes}}. Nothing if there is no file; Foreign if it is not ours."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Foreign(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("devices"), dict):
        raise Foreign("not a file of python -m dpresnet.tune")
    if content.get("format") != FORMAT:
        raise Foreign(f"format {content.get('format')!r}, this version reads {FORMAT}")
    return {device: _section(part) for device, part in content["devices"].items()}


def _section(part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or not isinstance(part.get("kernels"), str) or not isinstance(part.get("sizes"), dict):
        raise Foreign("not a file of python -m dpresnet.tune")
    return {"kernels": part["kernels"], "sizes": {key: _sizes(key, values) for key, values in part["sizes"].items()}}


def _sizes(key: str, values: Any) -> Sizes:
    """The sizes of an entry, whose key begins with the kernel."""
    kind = KERNELS.get(key.split(" ")[0])
    if kind is None or not isinstance(values, dict) or values.keys() != {f.name for f in fields(kind)}:
        raise Foreign(f"entry {key!r}: not sizes of a kernel")
    for name, value in values.items():
        if type(value) is not int or not 1 <= value <= (MOST_ROWS if name == "rows" else MOST):
            raise Foreign(f"entry {key!r}: {name} is {value!r}")
    return kind(**values)


def write(file: Path, device: str, kernels: str, measured: Mapping[str, Sizes | None]) -> int:
    """Adds what was measured to the file, replacing it at once, and returns the number of entries for the device.

    None stands for a launch whose shipped sizes are the best: an earlier entry goes. So do entries for other kernels.
    Other devices keep theirs. Raises Foreign rather than overwriting a file that is not ours, and OSError.
    """
    devices = read(file)
    before = devices.get(device, {})
    kept = before["sizes"] if before.get("kernels") == kernels else {}
    sizes = {key: found for key, found in {**kept, **measured}.items() if found}
    devices[device] = {"kernels": kernels, "sizes": dict(sorted(sizes.items()))}
    content = {"format": FORMAT, "devices": devices}
    replace_file(file, in_lines(json.dumps(content, indent=1, default=asdict)))
    _tuned.cache_clear()
    return len(sizes)


def in_lines(text: str) -> str:
    """Indented JSON with each innermost object in one line."""
    return re.sub(r"\{\s+([^{}]*?)\s+\}", lambda found: "{" + re.sub(r"\n\s+", " ", found[1]) + "}", text) + "\n"


def replace_file(file: Path, text: str) -> None:
    """Writes a file so that others see the old one or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
