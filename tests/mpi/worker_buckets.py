"""One rank of test_buckets.py: sums random gradients bucket by bucket and prints, as JSON, a digest of all bits and how they
went.

Arguments: replicas, seed, reduce ("common": tree, in memory that the ranks of a node share), wire. All buckets are under way
together, started in another order in each step and on each rank.
"""

import hashlib
import json
import sys
import time
from itertools import pairwise

import numpy as np

from dpresnet import buckets, events, tree
from dpresnet.buckets import allreduce
from dpresnet.comm import connect
from dpresnet.shared import Commons, paged
from dpresnet.wire import BLOCK, WIRES

SIZES = {1: [1, 2, 3, 1000, 17, 20_011, 150_000, 5], 128: [128, 384, 25_600, 149_888, 128]}  # by the unit of the wire
STEPS = 2


def gradients(seed, step, replica, n):
    """float32 [n] over 40 binary orders of magnitude: any other order of summation changes bits. In blocks of 128 the largest
    is just below a power of two, to which 16 bits round it.
    """
    rng = np.random.default_rng([seed, step, replica, n])
    values = np.ldexp(rng.standard_normal(n), rng.integers(-20, 20, n)).astype(np.float32)
    values[::BLOCK] = np.nextafter(np.float32(2**22), np.float32(0))
    return values


def main(replicas, seed, reduce, wire):
    comm, sizes = connect(), SIZES[WIRES[wire].unit]
    local = replicas // comm.size
    own = range(comm.rank * local, (comm.rank + 1) * local)
    bounds = np.cumsum([0, *sizes]).tolist()
    slices = [slice(a, b) for a, b in pairwise(bounds)]
    if comm.rank:  # others are done before this rank has copied what it needs of theirs
        move = buckets._move
        buckets._move = lambda *arrays: (time.sleep(0.002), move(*arrays))
    commons = common_arenas(comm, local, 4 * bounds[-1]) if reduce == "common" else None
    sums = allreduce(comm, replicas, slices, reduce, wire, commons)
    digest, sent, before = hashlib.sha256(), sent_by(comm), comm.traffic
    for step in range(STEPS):
        arenas = {v: np.concatenate([gradients(seed, step, v, n) for n in sizes]) for v in own}
        for common, v in zip(commons.own if commons else (), own, strict=bool(commons)):  # others may still sum, were it wrong
            common[: arenas[v].nbytes] = arenas[v].view(np.uint8)
            arenas[v] = common[: arenas[v].nbytes].view(np.float32)
        out = arenas[own.start] if step % 2 else np.full(bounds[-1], np.nan, np.float32)
        for k in np.random.default_rng([step, comm.rank]).permutation(len(sizes)):
            sums.start(k, [arenas[v][slices[k]] for v in own], out[slices[k]])
            time.sleep(0.001 * comm.rank)
            sums.progress()
        sums.wait()
        out = out.copy()
        for common in commons.own if commons else ():  # it is this rank's again
            common[:] = 255
        assert not sums.running
        want = np.concatenate([expected(replicas, seed, step, n, wire) for n in sizes])
        if reduce != "mpi":
            assert out.tobytes() == want.tobytes(), f"rank {comm.rank} step {step}"
        else:  # in any order
            most = np.concatenate([largest(replicas, seed, step, n) for n in sizes])
            assert (np.abs(out - want) <= replicas * 2.0**-23 * most).all(), f"rank {comm.rank} step {step}"
        digest.update(out)
    noted = sorted((event.channel, event.number, event.what) for event in events.in_order(comm.events.events))
    if reduce != "mpi":
        assert sum(count for _, count in sent) == (comm.traffic - before).sent_bytes
    digests, all_noted, all_sent = zip(*comm.gather((digest.hexdigest(), noted, sent)), strict=True)
    assert len(set(digests)) == 1
    assert all(of == all_noted[0] for of in all_noted), "an operation has not the same number and name on all ranks"
    if comm.rank == 0:
        across = sum(count for of in all_sent for another_node, count in of if another_node)
        texts = sorted({f"{channel}: {what}" for channel, _, what in noted if "bucket 3" in what})
        print(json.dumps({"ranks": comm.size, "digest": digests[0], "levels": len(comm.groups), "common": bool(commons),
                          "mpi": comm.mpi_library, "bytes_across": across // STEPS, "bucket_3": texts}))  # fmt: skip


def common_arenas(comm, local, nbytes):
    """Arenas that the ranks of a node share, if they can."""
    shared = comm.share(local * paged(nbytes))
    return Commons(shared, local, paged(nbytes)) if shared else None


def sent_by(comm):
    """A list that grows with every message to another rank: whether that is on another node, bytes."""
    sent = []
    if comm.size == 1:
        return sent
    from mpi4py import MPI  # the nodes as MPI tells them, not as the code under test has understood them

    nodes = MPI.COMM_WORLD.allgather(MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).bcast(comm.rank))

    def note(group, counts):
        others = ((rank, count) for rank, count in zip(group.ranks, counts, strict=True) if rank != comm.rank)
        sent.extend((nodes[rank] != nodes[comm.rank], count) for rank, count in others)

    def watch(group, start_alltoall, start_allgather, start_shared):
        def alltoall(send, send_counts, *rest):
            note(group, send_counts)
            return start_alltoall(send, send_counts, *rest)

        def allgather(send, *rest):
            note(group, [send.nbytes] * group.size)
            return start_allgather(send, *rest)

        def share(kind, shared, counter, nbytes, what):
            note(group, [nbytes] * group.size)
            return start_shared(kind, shared, counter, nbytes, what)

        group.start_alltoall, group.start_allgather, group.start_shared = alltoall, allgather, share

    for group in comm.groups:
        watch(group, group.start_alltoall, group.start_allgather, group.start_shared)
    return sent


def expected(replicas, seed, step, n, wire):
    """The fold over all replicas in this one process, without the code under test but for the tree and the format itself."""

    def rounded(values):
        values = np.array(values)
        WIRES[wire].round(values)
        return values

    def leaf(lo, hi):
        return rounded(gradients(seed, step, lo, n)) if hi - lo == 1 else None

    return rounded(tree.fold(0, replicas, leaf, np.add))


def largest(replicas, seed, step, n):
    """The sum of absolute values, which bounds every partial sum."""
    return sum(np.abs(gradients(seed, step, v, n)) for v in range(replicas))


main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
