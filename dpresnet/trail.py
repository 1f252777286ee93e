"""What every entry of a step has written, as 64-bit digests: recorded by the ranks of a run, compared when it is repeated.

A run with ``--record-every N`` leaves a file per recorded step and rank in RUN/trail. A replica's digests do not depend on the
rank that owns it, so the files of any number of ranks can be compared with one process that owns all replicas.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpresnet.errors import Refused

FORMAT = 1  # of the files
WHOLE_RANK = -1  # the replica of what all replicas of a rank have in common


class Mark(NamedTuple):
    """One digest; ``order`` counts the marks of a replica in a step, and on for what follows on the whole rank."""

    order: int
    micro_batch: int
    replica: int
    entry: str
    tensor: str
    digest: str

    def __str__(self) -> str:
        where = f" of replica {self.replica}" if self.replica != WHOLE_RANK else ""
        part = f" in micro-batch {self.micro_batch}" if self.micro_batch > 0 else ""
        return f"{self.entry}{where}{part}, tensor {self.tensor}"


@dataclass
class Trail:
    """The marks of one step, in the order in which they were made."""

    marks: list[Mark] = field(default_factory=list)
    _orders: dict[int, int] = field(default_factory=dict)

    def add(self, micro_batch: int, replica: int, entry: str, tensor: str, values: np.ndarray) -> None:
        """Notes what ``entry`` has written into ``tensor`` of a replica."""
        before = max(self._orders.values(), default=-1) if replica == WHOLE_RANK else self._orders.get(replica, -1)
        order = self._orders[replica] = before + 1
        digest = hashlib.blake2b(np.ascontiguousarray(values), digest_size=8).hexdigest()
        self.marks.append(Mark(order, micro_batch, replica, entry, tensor, digest))


@dataclass(frozen=True)
class Recorded:
    """The trail that one rank of a run has left of a step."""

    path: Path
    rank: int
    host: str
    marks: list[Mark]

    def first_difference(self, repeated: Trail) -> Mark | None:
        """The first mark, in the order of the step, that the repetition has made with another digest, or not at all."""
        again = {mark[:-1]: mark.digest for mark in repeated.marks}
        differing = [mark for mark in self.marks if again.get(mark[:-1]) != mark.digest]
        return min(differing, default=None)


def file_name(step: int, rank: int) -> str:
    """Of the trail of a rank after ``step`` steps."""
    return f"step-{step:08d}.rank-{rank}.json"


def write(folder: Path, step: int, rank: int, host: str, trail: Trail) -> None:
    """Leaves the trail of a step; a file is complete or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(step, rank)
    content = {"format": FORMAT, "step": step, "rank": rank, "host": host, "marks": trail.marks}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def forget(folder: Path, after: int = -1) -> None:
    """Removes what was recorded beyond step ``after``: a run that goes on from there has not been there yet."""
    for step, path in _files(folder):
        if step > after:
            path.unlink(missing_ok=True)


def read(folder: Path) -> dict[int, list[Recorded]]:
    """All trails by step. Refused for a file that is none."""
    found: dict[int, list[Recorded]] = {}
    for step, path in _files(folder):
        found.setdefault(step, []).append(_parse(path))
    return found


def _files(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.glob("step-*.rank-*.json")):
        if match := re.fullmatch(r"step-(\d+)\.rank-\d+\.json", path.name):
            yield int(match[1]), path


def _parse(path: Path) -> Recorded:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads {FORMAT}")
        return Recorded(path, int(content["rank"]), str(content["host"]), [Mark(*mark) for mark in content["marks"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is not a trail of this version ({error}): remove it") from None
