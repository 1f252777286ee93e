"""The last communication events of each rank, in files that outlive it: what a rank waits for, and who has not come.

All ranks of a run start the operations of a communicator in the same order, so an operation has a number there that is the
same on all ranks; so it has where groups of ranks do the same, each in a communicator of its own, which are one channel here.
A rank notes each operation when it starts and when it ends in a ring of `SLOTS` events. Once the folder of the run is known
the ring is a mapped file, RUN/events/rank-N.ring: what a rank had noted stays readable whatever ends it, even a kill, and the
others can look into it while it lives.
"""

from __future__ import annotations

import json
import struct
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from dpresnet import trace

SLOTS = 256
EVENT = np.dtype([  # times are seconds since 1970; ``ended`` is 0 while the rank waits; ``number`` counts from 1, 0: no event
    ("channel", "S12"), ("number", "<u8"), ("began", "<f8"), ("ended", "<f8"), ("nbytes", "<u8"), ("step", "<u4"),
    ("what", "S92"),
])  # fmt: skip
LAYOUT, ENDED = struct.Struct("<12sQddQI92s"), struct.Struct("<d")  # the same, written in a fraction of the time
HEADER_BYTES = 512  # JSON: rank, size, host
FORMAT = 1

BLOCKING = ("exchange", "node")  # channels on which a rank does nothing else meanwhile; sums of buckets go on beside its work
FAREWELL, GAVE_UP = "farewell", "timeout"  # channels of ranks that end: nobody waits there for work to go on

Note = tuple[str, int, int]


@dataclass(frozen=True)
class Traffic:
    """What a rank has had to do with others: bytes sent for steps, as far as an MPI library sends no more than it has to;
    seconds in which any operation was under way; seconds in which it did nothing but wait for one.
    """

    sent_bytes: int = 0
    active_s: float = 0.0
    waited_s: float = 0.0

    def __sub__(self, earlier: Traffic) -> Traffic:
        pairs = zip(astuple(self), astuple(earlier), strict=True)
        return Traffic(*(now - before for now, before in pairs))

    @property
    def metrics(self) -> dict[str, float]:
        """As the lines of metrics.jsonl tell it: MB (10^6 bytes) and ms."""
        return {"sent_mb": self.sent_bytes / 1e6, "comm_ms": 1e3 * self.active_s, "exposed_ms": 1e3 * self.waited_s}


class Ring:
    """The events of this rank. ``step`` and ``what`` say what it is doing, and are noted with each event."""

    def __init__(self) -> None:
        self._write_to(np.zeros(SLOTS, EVENT))
        self.step, self.what = 0, ""
        self._numbers: dict[str, int] = {}
        self._notes: list[Note | None] = [None] * SLOTS
        self._next = 0

    def _write_to(self, events: np.ndarray) -> None:
        self.events, self._bytes = events, memoryview(events.view(np.uint8))

    def keep(self, folder: Path, rank: int, size: int, host: str) -> None:
        """From now on in a file of ``folder``, with what has been noted so far."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank}.ring"
        header = json.dumps({"format": FORMAT, "rank": rank, "size": size, "host": host}).encode()
        path.write_bytes(header.ljust(HEADER_BYTES))
        kept = np.memmap(path, EVENT, "r+", HEADER_BYTES, (SLOTS,))
        kept[:] = self.events
        self._write_to(kept)

    def begin(self, channel: str, nbytes: int, what: str = "") -> Note:
        """Notes that an operation has been started; returns what `end` takes."""
        number = self._numbers[channel] = self._numbers.get(channel, 0) + 1
        slot, self._next = self._next, (self._next + 1) % SLOTS
        note = self._notes[slot] = channel, number, slot
        texts = channel.encode(), (what or self.what).encode()
        LAYOUT.pack_into(self._bytes, slot * LAYOUT.size, texts[0], number, trace.clock(), 0.0, nbytes, self.step, texts[1])
        return note

    def end(self, note: Note) -> None:
        """Notes that it is done."""
        slot = note[2]
        if self._notes[slot] is note:  # not overwritten by later ones
            ENDED.pack_into(self._bytes, slot * LAYOUT.size + EVENT.fields["ended"][1], trace.clock())
            if trace.recording():
                Event.of(self.events[slot]).trace()

    def waiting(self) -> list[Event]:
        """The operations that have not ended, the oldest first."""
        return under_way(in_order(self.events))


@dataclass(frozen=True)
class Event:
    """One operation of one rank."""

    channel: str
    number: int
    began: float
    ended: float
    nbytes: int
    step: int
    what: str

    @classmethod
    def of(cls, slot: np.void) -> Event:
        """As a ring holds it."""
        return cls(*(value.decode() if isinstance(value, bytes) else value for value in slot.item()))

    def trace(self) -> None:
        """Puts an operation that is done into the trace: where the rank waits, or beside it."""
        track = trace.HOST if self.channel in BLOCKING else trace.MPI
        facts = {"step": self.step, "channel": self.channel, "number": self.number, "bytes": self.nbytes}
        trace.note(track, self.what or self.channel, self.began, self.ended, **facts)

    def __str__(self) -> str:
        return f"{self.what or 'something'} of step {self.step} ({self.channel} {self.number}, {self.nbytes} bytes)"


def in_order(events: np.ndarray) -> list[Event]:
    """The events of a ring as they began."""
    noted = [Event.of(event) for event in events if event["number"]]
    return sorted(noted, key=lambda event: (event.began, event.number))


def under_way(events: list[Event]) -> list[Event]:
    """Those that have not ended."""
    return [event for event in events if not event.ended and event.channel not in (FAREWELL, GAVE_UP)]


@dataclass(frozen=True)
class Rank:
    """The ring of a rank, as read from its file."""

    rank: int
    size: int
    host: str
    events: list[Event]

    def reached(self, channel: str) -> int:
        """The number of the last operation it has started on a channel."""
        return max((event.number for event in self.events if event.channel == channel), default=0)

    @property
    def last(self) -> Event | None:
        """What it did last."""
        return max(self.events, key=lambda event: max(event.began, event.ended), default=None)

    @property
    def waits_for(self) -> Event | None:
        """What it has come to last and what has not ended; a sum of a bucket, which goes on besides, only if nothing else."""
        return max(under_way(self.events), key=lambda event: (event.channel in BLOCKING, event.began), default=None)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def read(folder: Path) -> list[Rank]:
    """The rings of a run in the order of the ranks; files that are none are left out."""
    found = []
    for path in folder.glob("rank-*.ring"):
        raw = path.read_bytes()
        try:
            header = json.loads(raw[:HEADER_BYTES])
            events = np.frombuffer(raw, EVENT, SLOTS, HEADER_BYTES)
            if header["format"] == FORMAT:
                found.append(Rank(header["rank"], header["size"], header["host"], in_order(events)))
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda rank: rank.rank)


def missing(ranks: list[Rank], event: Event) -> list[Rank]:
    """Those that have not started an operation that another waits for; not those that themselves wait for one of them, as a
    node does whose sum is late because one of its ranks is.
    """
    absent = [rank for rank in ranks if rank.reached(event.channel) < event.number]
    return [rank for rank in absent if not any(_behind(ranks, waits) for waits in under_way(rank.events))] or absent


def _behind(ranks: list[Rank], event: Event) -> bool:
    """Whether some rank has not started this operation."""
    return any(rank.reached(event.channel) < event.number for rank in ranks)


def describe(rank: Rank, now: float) -> str:
    """Where a rank stands."""
    if event := rank.waits_for:
        return f"{rank} has waited for {now - event.began:.0f} s in {event}"
    if event := rank.last:
        return f"{rank} was last seen {now - max(event.began, event.ended):.0f} s before, after {event}"
    return f"{rank} has exchanged nothing yet"
