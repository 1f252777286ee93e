"""Memory that the ranks of a node have in common."""

import os

import numpy as np
import pytest

from dpresnet import shared
from dpresnet.comm import Solo
from dpresnet.shared import COUNTERS, PAGE, Commons, Shared, accept, offer, paged, whole_bytes
from tests.launching import mpirun

IN_TURN = """
import os, sys, time, numpy as np
from dpresnet import comm, shared
if sys.argv[1] == "none":
    comm.offer = lambda nbytes: (_ for _ in ()).throw(OSError("no memory"))
if sys.argv[1] == "lost":
    accept, rank = comm.accept, int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))
    comm.accept = accept if rank != 1 else lambda *address: (_ for _ in ()).throw(OSError("another namespace"))
world = comm.connect()
before = len(os.listdir("/proc/self/fd"))
common = world.share(4096)
assert len(os.listdir("/proc/self/fd")) == before + (common is not None)  # Python's own, of the mapping
if sys.argv[1] != "all":
    assert common is None
    print("without")
    sys.exit()
for turn in range(200):
    common.parts[world.rank][:] = (turn + world.rank) % 251
    time.sleep(1e-4 * (turn % 3 == world.rank))
    arrival = common.reach(7)
    while not arrival.Test():
        time.sleep(0)
    for rank, part in enumerate(common.parts):
        assert (part == (turn + rank) % 251).all(), (turn, rank)
    read = common.reach(8)
    while not read.Test():
        time.sleep(0)
print("seen")
"""


@pytest.mark.parametrize(("kind", "words"), [("all", "seen"), ("none", "without"), ("lost", "without")])
def test_what_one_has_written_all_see_or_all_do_without(kind, words):
    job = mpirun(3, ["-c", IN_TURN, kind])
    assert job.returncode == 0, job.stderr
    assert job.stdout.count(words) == 3


def test_one_process_has_nobody_to_share_with():
    assert Solo().share(PAGE) is None


def test_the_same_memory_through_the_descriptor_of_another_process():
    fd = offer(2 * PAGE)
    first, second = (accept(os.getpid(), fd, 2 * PAGE) for _ in range(2))
    os.close(fd)
    assert not first.any()
    first[PAGE + 3] = 9
    assert second[PAGE + 3] == 9 and second.ctypes.data != first.ctypes.data


def test_what_cannot_be_had_is_an_os_error(monkeypatch):
    fd = offer(2**60)
    with pytest.raises(OSError):
        accept(os.getpid(), fd, 2**60)
    os.close(fd)
    with pytest.raises(OSError):
        accept(os.getpid(), 987654, PAGE)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="memfd_create"):
        shared.offer(PAGE)


def test_parts_are_whole_pages_and_lie_apart():
    memory = np.frombuffer(accept(os.getpid(), offer(whole_bytes(3, 2 * PAGE)), whole_bytes(3, 2 * PAGE)), np.uint8)
    commons = Commons(Shared(memory, 1, 3), 2, PAGE)
    assert [len(arenas) for arenas in commons.arenas] == [2, 2, 2] and commons.own is commons.arenas[1]
    for number, arena in enumerate(arena for arenas in commons.arenas for arena in arenas):
        assert arena.ctypes.data % PAGE == 0 and arena.nbytes == PAGE and not arena.any()
        arena[:] = number + 1
    assert [int(arena.max()) for arenas in commons.arenas for arena in arenas] == [1, 2, 3, 4, 5, 6]
    arrival = commons.shared.reach(COUNTERS - 1)
    assert not arrival.Test() and commons.arenas[0][0].min() == 1 and commons.arenas[2][1].max() == 6


@pytest.mark.parametrize(("nbytes", "pages"), [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2)])
def test_paged(nbytes, pages):
    assert paged(nbytes) == pages * PAGE


def test_a_point_is_reached_when_all_have_come_as_often():
    memory = np.zeros(whole_bytes(2, PAGE), np.uint8)
    left, right = (Shared(memory, rank, 2) for rank in range(2))
    first = left.reach(3)
    assert not first.Test()
    right.reach(4)
    assert not first.Test()
    right.reach(3)
    second = left.reach(3)
    assert first.Test() and not second.Test()
    right.reach(3)
    assert second.Test()
