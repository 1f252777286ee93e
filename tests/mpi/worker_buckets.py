"""One rank of test_buckets.py: sums random gradients bucket by bucket and prints a digest of all bits.

Arguments: replicas, seed. All buckets are under way together, started in another order in each step and on each rank.
"""

import hashlib
import sys
import time
from itertools import pairwise

import numpy as np

from dpresnet import tree
from dpresnet.buckets import TreeAllreduce
from dpresnet.comm import connect

SIZES = [1, 2, 3, 1000, 17, 20_011, 150_000, 5]
STEPS = 2


def gradients(seed, step, replica, n):
    """float32 [n] over 40 binary orders of magnitude: any other order of summation changes bits."""
    rng = np.random.default_rng([seed, step, replica, n])
    return np.ldexp(rng.standard_normal(n), rng.integers(-20, 20, n)).astype(np.float32)


def main(replicas, seed):
    comm = connect()
    local = replicas // comm.size
    own = range(comm.rank * local, (comm.rank + 1) * local)
    bounds = np.cumsum([0, *SIZES]).tolist()
    slices = [slice(a, b) for a, b in pairwise(bounds)]
    reduce = TreeAllreduce(comm, replicas, slices)
    digest = hashlib.sha256()
    for step in range(STEPS):
        arenas = {v: np.concatenate([gradients(seed, step, v, n) for n in SIZES]) for v in own}
        out = arenas[own.start] if step % 2 else np.full(bounds[-1], np.nan, np.float32)
        for k in np.random.default_rng([step, comm.rank]).permutation(len(SIZES)):
            reduce.start(k, [arenas[v][slices[k]] for v in own], out[slices[k]])
            time.sleep(0.001 * comm.rank)
            reduce.progress()
        reduce.wait()
        assert not reduce.running
        want = [expected(replicas, seed, step, n) for n in SIZES]
        assert out.tobytes() == np.concatenate(want).tobytes(), f"rank {comm.rank} step {step}"
        digest.update(out)
    digests = comm.gather(digest.hexdigest())
    assert len(set(digests)) == 1
    if comm.rank == 0:
        print(comm.size, digests[0])


def expected(replicas, seed, step, n):
    """The fold over all replicas in this one process, without the code under test but for the tree itself."""

    def leaf(lo, hi):
        return gradients(seed, step, lo, n) if hi - lo == 1 else None

    return tree.fold(0, replicas, leaf, np.add)


main(int(sys.argv[1]), int(sys.argv[2]))
