"""The sum of the replicas' gradients, bucket by bucket while backward goes on.

`TreeAllreduce` adds in one fixed tree. A rank that owns several replicas first sums those that form nodes of the tree
(``tree.maximal_nodes``; one node where replicas and ranks are powers of two). Each of these node sums is cut into one
segment per rank, and the segments are exchanged (all-to-all): every rank then holds all the parts of its own segment,
completes the tree there, and hands the result to everybody (all-gather). That moves no more data than an ordinary
all-reduce, and it gives the same bits for every number of ranks, because the tree depends on the number of replicas alone.

`MpiAllreduce` leaves the sum over ranks, and its order, to the MPI library.

MPI makes no progress on its own: whoever is busy elsewhere calls ``progress()`` now and then.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from dpresnet import trace, tree
from dpresnet.comm import BULK_SPIN_S, Comm
from dpresnet.wire import WIRES, Wire

# Each poll moves one small piece of the data (under MPICH on one node). So progress() polls several times, and wait() does
# not nap between polls, which would throttle the exchange to a twentieth of its speed, unless the others are late.
POLLS = 4

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


def segments(n: int, ranks: int, unit: int = 1) -> list[int]:
    """The lengths of the ``ranks`` contiguous segments of ``n`` elements, multiples of ``unit`` as ``n`` is: they differ by
    one unit at most, and may be 0.
    """
    units = n // unit
    return [(units * (r + 1) // ranks - units * r // ranks) * unit for r in range(ranks)]


def _add(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.add(left, right, out=left)


def _cut(a: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """Neighbouring parts of these lengths."""
    bounds = np.cumsum([0, *lengths]).tolist()
    return [a[begin:end] for begin, end in pairwise(bounds)]


class Allreduce(ABC):
    """Sums float32 gradients over ``replicas``, of which each of ``comm.size`` ranks owns an equal, contiguous range.

    ``buckets``: the slices of the gradient arena, in elements, the same on all ranks. Once per step each bucket is
    started; in between ``progress()``; at the end ``wait()``.
    """

    def __init__(self, comm: Comm, replicas: int, buckets: Sequence[slice]) -> None:
        if replicas % comm.size:
            raise ValueError(f"{replicas} replicas cannot be divided among {comm.size} ranks")
        self._comm, self._replicas = comm, replicas
        self._local = replicas // comm.size
        self._own = range(comm.rank * self._local, (comm.rank + 1) * self._local)
        self._nodes = tree.maximal_nodes(replicas, self._own)
        self._lengths = [bucket.stop - bucket.start for bucket in buckets]
        self._forget()

    @abstractmethod
    def _reduce(self, k: int, leaves: list[np.ndarray], out: np.ndarray) -> Iterator[None]:
        """The life of one bucket; each ``yield`` gives the core back where it would have to wait."""

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
        self._waiting[k] = self._traced(k, self._reduce(k, list(leaves), out))
        while self._launched in self._waiting:
            self._running.append(self._waiting.pop(self._launched))
            self._launched += 1
        self.progress()

    def _traced(self, k: int, steps: Iterator[None]) -> Iterator[None]:
        began = trace.clock()
        yield from steps
        trace.note(f"bucket {k}", f"bucket {k}", began, trace.clock(), bytes=4 * self._lengths[k])

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
        self._comm.wait_until(self._finished, BULK_SPIN_S)
        self._forget()

    def _finished(self) -> bool:
        self.progress()
        return not self._running

    def _check(self, k: int, leaves: Sequence[np.ndarray], out: np.ndarray) -> None:
        if k < self._launched or k in self._waiting:
            raise RuntimeError(f"bucket {k} was started twice without wait() in between")
        if len(leaves) != len(self._own):
            raise ValueError(f"bucket {k} got {len(leaves)} leaves for the {len(self._own)} replicas of this rank")
        shape = (self._lengths[k],)
        for a in (*leaves, out):
            if a.dtype != np.float32 or a.shape != shape or not a.flags.c_contiguous:
                raise ValueError(f"bucket {k} takes contiguous float32 of shape {shape}, not {a.dtype} {a.shape}")

    def _partial_sum(self, node: Node, leaves: list[np.ndarray]) -> np.ndarray:
        """The sum of the replicas of ``node``, in place in the first one's leaf."""
        first = self._own.start
        return tree.fold(*node, lambda lo, hi: leaves[lo - first] if hi - lo == 1 else None, _add)


class MpiAllreduce(Allreduce):
    """The sums of this rank's replicas in the order of the tree, of the ranks in whatever order the MPI library has: the bits
    depend on it, on the number of ranks, and perhaps on where they run.
    """

    def _reduce(self, k: int, leaves: list[np.ndarray], out: np.ndarray) -> Iterator[None]:
        first, *others = (self._partial_sum(node, leaves) for node in self._nodes)
        for other in others:
            _add(first, other)
        if not np.may_share_memory(out, first):
            out[:] = first
        if self._comm.size > 1:
            request = self._comm.start_allreduce(out, f"bucket {k}")
            while not request.test():
                yield


class _Round:
    """What the ranks exchange at the same time: the j-th node of each, or nothing where a rank has fewer.

    A single replica's contribution travels in the wire's format, a sum in fp32, so that nothing is rounded twice.
    """

    def __init__(self, j: int, rank: int, nodes: list[list[Node]], lengths: list[int], wire: Wire) -> None:
        self._nodes = [of[j] if len(of) > j else None for of in nodes]
        self._formats = [wire if node and node[1] - node[0] == 1 else WIRES["fp32"] for node in self._nodes]
        self.format = self._formats[rank]
        self.send_counts = [self.format.nbytes(n) if self._nodes[rank] else 0 for n in lengths]
        self.counts = [of.nbytes(lengths[rank]) if node else 0 for node, of in zip(self._nodes, self._formats, strict=True)]
        self.received = np.empty(sum(self.counts), np.uint8)

    def parts(self) -> dict[Node, np.ndarray]:
        """This rank's segment of each node, once all have arrived."""
        messages = zip(self._nodes, self._formats, _cut(self.received, self.counts), strict=True)
        return {node: of.decode(message) for node, of, message in messages if node}


class TreeAllreduce(Allreduce):
    """The sums are those of ``tree.fold``, bit for bit, for any number of ranks that divides ``replicas``. With a ``wire`` of
    16 bits each replica's contribution is rounded, and the sum: see `dpresnet.wire`.
    """

    def __init__(self, comm: Comm, replicas: int, buckets: Sequence[slice], wire: Wire = WIRES["fp32"]) -> None:
        super().__init__(comm, replicas, buckets)
        self._wire = wire
        if odd := [n for n in self._lengths if n % wire.unit]:
            raise ValueError(f"a bucket of {odd[0]} values cannot travel as {wire.name}: use multiples of {wire.unit}")
        nodes = [tree.maximal_nodes(replicas, range(r * self._local, (r + 1) * self._local)) for r in range(comm.size)]
        self._segments = [segments(n, comm.size, wire.unit) for n in self._lengths]
        most = max(map(len, nodes)) if comm.size > 1 else 0  # one rank has every sum already
        self._rounds = [[_Round(j, comm.rank, nodes, lengths, wire) for j in range(most)] for lengths in self._segments]

    def _reduce(self, k: int, leaves: list[np.ndarray], out: np.ndarray) -> Iterator[None]:
        for leaf in leaves if self._comm.size == 1 or len(leaves) > 1 else ():  # others are rounded on their way
            self._wire.round(leaf)
        sums = [self._partial_sum(node, leaves) for node in self._nodes]
        if self._comm.size == 1:
            self._wire.round(sums[0])
            if not np.may_share_memory(out, sums[0]):
                out[:] = sums[0]
            return
        requests = self._exchange(k, sums)
        # The all-gathers of several buckets share a communicator, so they too have to start in the order of the plan.
        while not (all([r.test() for r in requests]) and self._spread == k):  # a list: each request is to be tested
            yield
        parts = {node: part for of in self._rounds[k] for node, part in of.parts().items()}
        total = tree.fold(0, self._replicas, lambda lo, hi: parts.get((lo, hi)), _add)
        message, received = self._wire.encode(total), self._wire.room(out)
        counts = [self._wire.nbytes(n) for n in self._segments[k]]
        request = self._comm.start_allgather(message, received, counts, f"the sum of bucket {k}")
        self._spread += 1
        while not request.test():
            yield
        self._wire.decode(received, out)

    def _exchange(self, k: int, sums: list[np.ndarray]) -> list:
        """Starts giving every rank its segments of this rank's sums; the messages stay alive with the requests."""
        nothing, requests = np.empty(0, np.uint8), []
        for j, of in enumerate(self._rounds[k]):
            message = of.format.encode(sums[j]) if j < len(sums) else nothing
            arrays = message, of.send_counts, of.received, of.counts
            requests.append(self._comm.start_alltoall(*arrays, f"the parts of bucket {k}"))
        return requests


def allreduce(comm: Comm, replicas: int, buckets: Sequence[slice], reduce: str = "tree", wire: str = "fp32") -> Allreduce:
    """By the names of ``--reduce`` and ``--wire``."""
    return MpiAllreduce(comm, replicas, buckets) if reduce == "mpi" else TreeAllreduce(comm, replicas, buckets, WIRES[wire])
