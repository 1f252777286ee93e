"""Memory that the ranks of a node have in common, so that what one has written the others read where it lies.

Every rank has a part of it, and counters: each says how often the rank has reached some point. A rank that has counted up
goes on when all others have, too. The memory has no name in any file system (``memfd_create``): it is gone with the last
process that uses it, whatever ended that, and is not limited by the size of /dev/shm. Where a system has none of this, ranks
exchange messages.
"""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass

import numpy as np

PAGE = mmap.PAGESIZE
COUNTERS = PAGE // 8  # of a rank


def offer(nbytes: int) -> int:
    """A file descriptor for ``nbytes`` of zeros, which take memory when they are written. Raises OSError."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd_create")
    fd = os.memfd_create("dpresnet")
    os.ftruncate(fd, nbytes)
    return fd


def accept(pid: int, fd: int, nbytes: int) -> np.ndarray:
    """The memory, uint8 [nbytes], behind a file descriptor of a process of this user. Raises OSError."""
    own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(own, nbytes), np.uint8)
    finally:
        os.close(own)


def whole_bytes(ranks: int, nbytes: int) -> int:
    """Of the memory in which each of ``ranks`` has ``nbytes`` (whole pages)."""
    return ranks * (8 * COUNTERS + nbytes)


class Shared:
    """The memory as one of its ``ranks`` sees it: ``parts[i]`` is uint8 [nbytes] of rank i, on page boundaries."""

    def __init__(self, memory: np.ndarray, rank: int, ranks: int):
        rows = memory.reshape(ranks, -1)
        self.rank, self.ranks = rank, ranks
        self._counters = rows[:, : 8 * COUNTERS].view(np.int64)
        self.parts = [row[8 * COUNTERS :] for row in rows]
        self._fence = threading.Lock()

    def reach(self, counter: int) -> Arrival:
        """This rank has come to the point ``counter`` once more; the result tells when all have come as often.

        What a rank has written before, others see when they know that it has come: taking and giving back a lock keeps the
        order of writing also on processors that do not.
        """
        self._order()
        self._counters[self.rank, counter] += 1
        return Arrival(self, counter, int(self._counters[self.rank, counter]))

    def reached(self, counter: int, times: int) -> bool:
        """Whether all ranks have come to a point so many times."""
        if (self._counters[:, counter] >= times).all():
            self._order()
            return True
        return False

    def _order(self) -> None:
        for _ in range(2):
            with self._fence:
                pass


class Commons:
    """The gradient arenas of ``replicas`` replicas on each rank of a node, of ``nbytes`` each (whole pages), in memory that the
    ranks have in common: ``arenas[i][j]`` is uint8 [nbytes] of replica j on rank i.
    """

    def __init__(self, shared: Shared, replicas: int, nbytes: int):
        self.shared = shared
        self.arenas = [[part[j * nbytes : (j + 1) * nbytes] for j in range(replicas)] for part in shared.parts]

    @property
    def own(self) -> list[np.ndarray]:
        """Those of this rank."""
        return self.arenas[self.shared.rank]


def paged(nbytes: int) -> int:
    """Rounds up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


@dataclass(frozen=True)
class Arrival:
    """A point that this rank has come to, in the manner of an MPI request."""

    shared: Shared
    counter: int
    times: int

    def Test(self) -> bool:
        """Whether all have come."""
        return self.shared.reached(self.counter, self.times)
