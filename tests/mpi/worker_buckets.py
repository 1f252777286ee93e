"""One rank of test_buckets.py: sums random gradients bucket by bucket and prints a digest of all bits.

Arguments: replicas, seed, reduce, wire. All buckets are under way together, started in another order in each step and on each
rank.
"""

import hashlib
import sys
import time
from itertools import pairwise

import numpy as np

from dpresnet import tree
from dpresnet.buckets import allreduce
from dpresnet.comm import connect
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
    sums = allreduce(comm, replicas, slices, reduce, wire)
    digest = hashlib.sha256()
    for step in range(STEPS):
        arenas = {v: np.concatenate([gradients(seed, step, v, n) for n in sizes]) for v in own}
        out = arenas[own.start] if step % 2 else np.full(bounds[-1], np.nan, np.float32)
        for k in np.random.default_rng([step, comm.rank]).permutation(len(sizes)):
            sums.start(k, [arenas[v][slices[k]] for v in own], out[slices[k]])
            time.sleep(0.001 * comm.rank)
            sums.progress()
        sums.wait()
        assert not sums.running
        want = np.concatenate([expected(replicas, seed, step, n, wire) for n in sizes])
        if reduce == "tree":
            assert out.tobytes() == want.tobytes(), f"rank {comm.rank} step {step}"
        else:  # in any order
            most = np.concatenate([largest(replicas, seed, step, n) for n in sizes])
            assert (np.abs(out - want) <= replicas * 2.0**-23 * most).all(), f"rank {comm.rank} step {step}"
        digest.update(out)
    digests = comm.gather(digest.hexdigest())
    assert len(set(digests)) == 1
    if comm.rank == 0:
        print(comm.size, digests[0])


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
