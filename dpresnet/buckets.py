"""The sum of the replicas' gradients, bucket by bucket while backward goes on, in one fixed tree.

A rank that owns several replicas first sums those that form nodes of the tree (``tree.maximal_nodes``; one node where
replicas and ranks are powers of two). Each of these node sums is cut into one segment per rank, and the segments are
exchanged (all-to-all): every rank then holds all the parts of its own segment, completes the tree there, and hands the
result to everybody (all-gather). That moves no more data than an ordinary all-reduce, and it gives the same bits for
every number of ranks, because the tree depends on the number of replicas alone.

MPI makes no progress on its own: whoever is busy elsewhere calls ``progress()`` now and then.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from dpresnet import tree
from dpresnet.comm import Comm

# Each poll moves one small piece of the data (under MPICH on one node). So progress() polls several times, and wait() does
# not nap between polls, which would throttle the exchange to a twentieth of its speed, unless the others are late.
POLLS = 4
SPIN_S = 1.0

Node = tuple[int, int]
_DONE = object()


def plan_buckets(sizes: Sequence[int], first_mb: float, cap_mb: float) -> list[range]:
    """Cut the gradients, of ``sizes`` bytes in the order in which backward produces them, into consecutive buckets.

    A bucket is closed by the gradient that fills it to its limit: ``first_mb`` MiB for the first, which so gets under
    way early, ``cap_mb`` for the others. This is the rule of PyTorch's DistributedDataParallel.
    """
    buckets, begin, filled = [], 0, 0
    for i, size in enumerate(sizes):
        filled += size
        if filled >= (cap_mb if buckets else first_mb) * 2**20:
            buckets.append(range(begin, i + 1))
            begin, filled = i + 1, 0
    if begin < len(sizes):
        buckets.append(range(begin, len(sizes)))
    return buckets


def segments(n: int, ranks: int) -> list[int]:
    """The lengths of the ``ranks`` contiguous segments of ``n`` elements: they differ by one at most, and may be 0."""
    return [n * (r + 1) // ranks - n * r // ranks for r in range(ranks)]


def _add(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.add(left, right, out=left)


class _Bucket:
    """The fixed facts of one bucket on this rank: who sends which node, and where its segments arrive.

    The j-th nodes of all ranks are exchanged together; a rank with fewer nodes sends nothing in the later rounds.
    """

    def __init__(self, n: int, rank: int, nodes: list[list[Node]]) -> None:
        self.n = n
        self.segments = segments(n, len(nodes))
        mine = self.segments[rank]
        self.rounds: list[tuple[np.ndarray, list[int]]] = []
        self.parts: dict[Node, np.ndarray] = {}  # of this rank's segment, in place in the receive buffers
        for j in range(max(map(len, nodes))):
            counts = [mine if len(of) > j else 0 for of in nodes]
            received = np.empty(sum(counts), np.float32)
            senders = [of[j] for of in nodes if len(of) > j]
            self.rounds.append((received, counts))
            self.parts.update(zip(senders, received.reshape(len(senders), mine), strict=True))


class TreeAllreduce:
    """Sums float32 gradients over ``replicas``, of which each of ``comm.size`` ranks owns an equal, contiguous range.

    ``buckets``: the slices of the gradient arena, in elements, the same on all ranks. Once per step each bucket is
    started; in between ``progress()``; at the end ``wait()``. The sums are those of ``tree.fold``, bit for bit, for any
    number of ranks that divides ``replicas``.
    """

    def __init__(self, comm: Comm, replicas: int, buckets: Sequence[slice]) -> None:
        if replicas % comm.size:
            raise ValueError(f"{replicas} replicas cannot be divided among {comm.size} ranks")
        self._comm = comm
        self._replicas = replicas
        local = replicas // comm.size
        self._own = range(comm.rank * local, (comm.rank + 1) * local)
        nodes = [tree.maximal_nodes(replicas, r * local, (r + 1) * local) for r in range(comm.size)]
        self._nodes = nodes[comm.rank]
        exchanged = nodes if comm.size > 1 else [[]]  # one rank has every sum already
        self._buckets = [_Bucket(b.stop - b.start, comm.rank, exchanged) for b in buckets]
        self._forget()

    def _forget(self) -> None:
        self._waiting: dict[int, Iterator[None]] = {}  # started, but an earlier bucket is not
        self._running: list[Iterator[None]] = []
        self._launched = 0  # buckets 0 .. launched-1 have been sent
        self._spread = 0  # buckets 0 .. spread-1 have been summed and handed out

    @property
    def running(self) -> bool:
        """Whether any bucket is under way."""
        return bool(self._running or self._waiting)

    def start(self, k: int, leaves: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Start summing bucket ``k`` into ``out``; returns at once.

        ``leaves``: the contribution of each replica of this rank, in order. ``leaves`` and ``out`` are contiguous
        float32 [n] and belong to the sum until ``wait()``; afterwards the leaves hold partial sums. ``out`` may be the
        first leaf, which saves a copy when there is one rank, but must not overlap another.

        All ranks have to exchange their buckets in one order. That is the order of the plan: a bucket that is started
        before its predecessors is sent with the last of them.
        """
        self._check(k, leaves, out)
        self._waiting[k] = self._reduce(k, list(leaves), out)
        while self._launched in self._waiting:
            self._running.append(self._waiting.pop(self._launched))
            self._launched += 1
        self.progress()

    def progress(self) -> None:
        """Advance every bucket under way as far as it goes without waiting."""
        for _ in range(POLLS):
            self._running = [steps for steps in self._running if next(steps, _DONE) is not _DONE]

    def wait(self) -> None:
        """Return when every bucket started since the last ``wait()`` is summed, in ``out``, on this rank."""
        if self._waiting:
            raise RuntimeError(
                f"bucket {min(self._waiting)} was started, but bucket {self._launched}, which goes before it, never was"
            )
        self._comm.wait_until(self._finished, SPIN_S)
        self._forget()

    def _finished(self) -> bool:
        self.progress()
        return not self._running

    def _check(self, k: int, leaves: Sequence[np.ndarray], out: np.ndarray) -> None:
        if k < self._launched or k in self._waiting:
            raise RuntimeError(f"bucket {k} was started twice without wait() in between")
        if len(leaves) != len(self._own):
            raise ValueError(f"bucket {k} got {len(leaves)} leaves for the {len(self._own)} replicas of this rank")
        shape = (self._buckets[k].n,)
        for a in (*leaves, out):
            if a.dtype != np.float32 or a.shape != shape or not a.flags.c_contiguous:
                raise ValueError(f"bucket {k} takes contiguous float32 of shape {shape}, not {a.dtype} {a.shape}")

    def _reduce(self, k: int, leaves: list[np.ndarray], out: np.ndarray) -> Iterator[None]:
        """The life of one bucket; each ``yield`` gives the core back where it would have to wait."""
        sums = [self._partial_sum(node, leaves) for node in self._nodes]
        if self._comm.size == 1:
            if not np.may_share_memory(out, sums[0]):
                out[:] = sums[0]
            return
        bucket = self._buckets[k]
        requests = self._exchange(k, sums)
        # The all-gathers of several buckets share a communicator, so they too have to start in the order of the plan.
        while not (all([r.test() for r in requests]) and self._spread == k):  # a list: each request is to be tested
            yield
        total = tree.fold(0, self._replicas, lambda lo, hi: bucket.parts.get((lo, hi)), _add)
        request = self._comm.start_allgather(total, out, bucket.segments, f"the sum of bucket {k}")
        self._spread += 1
        while not request.test():
            yield

    def _partial_sum(self, node: Node, leaves: list[np.ndarray]) -> np.ndarray:
        """The sum of the replicas of ``node``, in place in the first one's leaf."""
        first = self._own.start
        return tree.fold(*node, lambda lo, hi: leaves[lo - first] if hi - lo == 1 else None, _add)

    def _exchange(self, k: int, sums: list[np.ndarray]) -> list:
        bucket, what = self._buckets[k], f"the parts of bucket {k}"
        nothing = np.empty(0, np.float32), [0] * self._comm.size
        requests = []
        for j, (received, counts) in enumerate(bucket.rounds):
            send, send_counts = (sums[j], bucket.segments) if j < len(sums) else nothing
            requests.append(self._comm.start_alltoall(send, send_counts, received, counts, what))
        return requests
