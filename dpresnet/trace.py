"""What a rank does and when: spans of time that any module may note, and the file in which ui.perfetto.dev shows them.

A process has one recording at most, as it has one log. While there is none a note costs less than a microsecond:

    with trace.span("update"):
        ...

The file is in the JSON format of Chrome's trace viewer ("Trace Event Format", Google 2016). A rank is a process there. Its
tracks are the thread that replays the plan, the device, the thread that loads images, and one per bucket of gradients; sums
that MPI works on meanwhile may overlap each other, and are asynchronous events.
"""

from __future__ import annotations

import gzip
import json
import math
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HOST, DEVICE, MPI = "host", "device", "MPI"
ASYNCHRONOUS = (MPI,)  # tracks whose spans may overlap
MOST_SPANS = 1_000_000  # of a rank, some 300 MB; what comes later is not noted
US = 1e6  # microseconds, the unit of the file

clock = time.time  # seconds since 1970, the only clock that machines have nearly in common


class Span(NamedTuple):
    """From ``began`` to ``ended``, in seconds of this rank's clock."""

    track: str
    name: str
    began: float
    ended: float
    facts: dict[str, Any]


@dataclass
class Part:
    """The recording of one rank, whose clock is ``ahead`` of rank 0's by so many seconds, give or take ``doubt``."""

    rank: int = 0
    host: str = ""
    ahead: float = 0.0
    doubt: float = 0.0
    spans: list[Span] = field(default_factory=list)


_recording: list[Span] | None = None


def start() -> list[Span]:
    """From now on spans are noted in the list that is returned."""
    global _recording
    _recording = []
    return _recording


def stop() -> None:
    """No more."""
    global _recording
    _recording = None


def recording() -> bool:
    """Whether notes are kept."""
    return _recording is not None


def note(track: str, name: str, began: float, ended: float, **facts: Any) -> None:
    """Notes a span that is over, while anything is recorded."""
    if _recording is not None and len(_recording) < MOST_SPANS:
        _recording.append(Span(track, name, began, ended, facts))


def span(name: str, **facts: Any) -> AbstractContextManager[None]:
    """Notes how long the block takes, on the track of the present thread."""
    return _noted(name, facts) if recording() else nullcontext()


@contextmanager
def _noted(name: str, facts: dict[str, Any]) -> Iterator[None]:
    thread, began = threading.current_thread(), clock()
    yield
    note(HOST if thread is threading.main_thread() else thread.name, name, began, clock(), **facts)


def covered(spans: Iterable[Sequence[Any]], begin: float = -math.inf, end: float = math.inf) -> float:
    """The time from ``begin`` to ``end`` that lies in at least one of the spans (begin, end, ...)."""
    total, until = 0.0, begin
    for first, last, *_ in sorted(spans, key=lambda span: span[:2]):
        total += max(0.0, min(last, end) - max(first, until))
        until = max(until, min(last, end))
    return total


# The file


def events(part: Part, origin: float) -> Iterator[dict[str, Any]]:
    """What Chrome's viewer reads of one rank; times count from ``origin``, in seconds of rank 0's clock."""
    pid, tracks = part.rank, {HOST: 0, DEVICE: 1}
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"rank {part.rank} on {part.host}"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for number, (track, name, began, ended, facts) in enumerate(sorted(part.spans, key=lambda s: (s.began, -s.ended))):
        common = {"name": name, "cat": track, "pid": pid, "tid": tracks.setdefault(track, len(tracks))}
        ts, dur = US * (began - part.ahead - origin), US * (ended - began)
        if track in ASYNCHRONOUS:
            common["id"] = f"{pid}.{number}"
            yield {**common, "ph": "b", "ts": ts, "args": facts}
            yield {**common, "ph": "e", "ts": ts + dur}
        else:
            yield {**common, "ph": "X", "ts": ts, "dur": dur, "args": facts}
    for track, tid in tracks.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def write(path: Path, parts: list[Part], **about: Any) -> None:
    """All ranks on the clock of rank 0; compressed if the name ends with .gz. The file is whole or not there."""
    began = [span.began - part.ahead for part in parts for span in part.spans]
    origin = min(began, default=0.0)
    about["clocks"] = [{"rank": part.rank, "ahead_s": part.ahead, "doubt_s": part.doubt} for part in parts]
    lines = ",\n".join(json.dumps(event) for part in parts for event in events(part, origin))
    head = json.dumps({"displayTimeUnit": "ms", "otherData": {"began": origin, **about}})
    data = f'{head[:-1]}, "traceEvents": [\n{lines}\n]}}\n'.encode()
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What `write` has written. Raises ValueError or OSError for other files."""
    data = path.read_bytes()
    try:
        found = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (EOFError, zlib.error) as error:
        raise ValueError(f"damaged: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("traceEvents"), list):
        raise ValueError("no trace events in it")
    return found
