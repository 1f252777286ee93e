"""One rank of test_comm.py: every collective against what it must give, computed from the ranks alone."""

import sys
import time

import numpy as np

from dpresnet.comm import connect

comm = connect()
P, me = comm.size, comm.rank
assert int(sys.argv[1]) == P, f"{P} ranks"


def same(got, want):
    want = np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape and (got == want).all(), (me, got, want)


for dtype in (np.float32, np.float64, np.int64):
    for shape in ((), (1,), (5,), (3, 4), (0,)):
        per_rank = [np.full(shape, 10 * r + 1 / 3 if dtype != np.int64 else r, dtype) for r in range(P)]
        same(comm.allgather(per_rank[me]), per_rank)
    strided = np.arange(12, dtype=dtype).reshape(3, 4).T + me
    same(comm.allgather(strided), [np.arange(12, dtype=dtype).reshape(3, 4).T + r for r in range(P)])

first = comm.allgather(np.array([me]))
comm.allgather(np.array([me + 100]))
same(first, [[r] for r in range(P)])  # a result is not overwritten by the next call

same(comm.agree([me == P - 1, me == 0, False]), np.array([1, 1, 0]))
same(comm.agree(np.array([[me, -me], [7, 0]])), np.array([[P - 1, 0], [7, 0]]))

message = {"rank": me, "array": np.arange(1000 * (me + 1)), "text": "x" * me}
got = comm.bcast(message)
assert got["rank"] == 0 and got["array"].size == 1000
rows = comm.gather(message)
assert [r["rank"] for r in rows] == list(range(P))
assert all(r["array"].size == 1000 * (i + 1) and r["text"] == "x" * i for i, r in enumerate(rows))

# Rank s hands 1 + s + 2 d bytes to rank d, and nothing at all to the next rank.
count = [[0 if (s + 1) % P == d else 1 + s + 2 * d for d in range(P)] for s in range(P)]
send = np.concatenate([np.full(count[me][d], 50 * me + d, np.uint8) for d in range(P)])
want = np.concatenate([np.full(count[s][me], 50 * s + me, np.uint8) for s in range(P)])
recv = np.full(want.size, 255, np.uint8)
joined = np.full(sum(range(P)), 255, np.uint8)
added = np.arange(1000, dtype=np.float32) * (me + 1)
(everyone,) = comm.groups
assert everyone.ranks == list(range(P)) and everyone.rank == me
before = comm.traffic
operations = [
    lambda: everyone.start_alltoall(send, count[me], recv, [count[s][me] for s in range(P)]),
    lambda: everyone.start_allgather(np.full(me, me, np.uint8), joined, list(range(P))),
    lambda: comm.start_allreduce(added),
]
order = [0, 1, 2] if me % 2 else [1, 2, 0]  # operations of two communicators in any order
requests = [operations[i]() for i in order]
same(comm.allgather(np.array(me)), np.arange(P))  # and a third communicator goes past them
for request in requests:
    request.wait()
    assert request.test()
same(recv, want)
same(joined, np.repeat(np.arange(P, dtype=np.uint8), range(P)))
same(added, np.arange(1000, dtype=np.float32) * sum(range(1, P + 1)))
others = P - 1
sent = send.size - count[me][me] + me * others + 2 * 4000 * others // P + np.array(me).nbytes * others
assert (comm.traffic - before).sent_bytes == sent, (comm.traffic, sent)

started, before = time.monotonic(), comm.traffic
time.sleep(0.3 if me == P - 1 else 0)
beside = comm.start_allreduce(added)
comm.barrier()
beside.wait()
assert time.monotonic() - started > 0.25 or P == 1, "the barrier did not wait for the last rank"
spent = comm.traffic - before
assert me == P - 1 or 0.25 < spent.waited_s <= spent.active_s < time.monotonic() - started, spent
spent = comm.traffic
time.sleep(0.05)
assert comm.traffic == spent, "time without an operation counts as one"
comm.node_barrier()

assert comm.gather((comm.local_rank, comm.local_size)) == [(r, P) for r in range(P)]
if me == 0:
    print("all as expected:", comm.mpi_library)
