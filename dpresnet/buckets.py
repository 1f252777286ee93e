"""The sum of the replicas' gradients, bucket by bucket while backward goes on.

`TreeAllreduce` adds in one fixed tree. A rank that owns several replicas first sums those that form nodes of the tree
(``tree.maximal_nodes``; one node where replicas and ranks are powers of two). Each of these node sums is cut into one
segment per rank, and the segments are exchanged (all-to-all): every rank then holds all the parts of its own segment,
completes the tree there, and hands the result to everybody (all-gather). That moves no more data than an ordinary
all-reduce, and it gives the same bits for every number of ranks, because the tree depends on the number of replicas alone.

With several ranks on each of several nodes there are two stages (``comm.groups``). The ranks of a node exchange first; each
completes as much of the tree in its segment as the replicas of the node cover, and exchanges that, in smaller segments, with
the ranks that hold the same segment on the other nodes. The results go back the same way. So a node sends a sum of its
replicas once to the others, instead of a part from every rank.

Where the ranks of a node have the memory of their gradients in common (`dpresnet.shared`), the first stage needs no messages:
a rank adds its segment of all arenas where they lie, and copies the segments that others have added.

`MpiAllreduce` leaves the sum over ranks, and its order, to the MPI library.

MPI makes no progress on its own: whoever is busy elsewhere calls ``progress()`` now and then.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from dpresnet import trace, tree
from dpresnet.comm import BULK_SPIN_S, SPIN_S, Comm, Group, Level, Request
from dpresnet.shared import Commons, Shared
from dpresnet.wire import WIRES, Wire

# Each poll moves one small piece of the data (under MPICH on one node). So progress() polls several times, and wait() does
# not nap between polls, which would throttle the exchange to a twentieth of its speed, unless the others are late.
POLLS = 4

Node = tuple[int, int]
_DONE = object()
_PARTS, _SUMS, _LEFT = range(3)  # points that ranks with common memory come to, with all buckets in the order of the plan


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

    @property
    def _spin_s(self) -> float:
        """How long ``wait`` polls without naps."""
        return BULK_SPIN_S

    @abstractmethod
    def _reduce(self, k: int, leaves: list[np.ndarray], out: np.ndarray) -> Iterator[None]:
        """The life of one bucket; each ``yield`` gives the core back where it would have to wait."""

    def _forget(self) -> None:
        self._waiting: dict[int, Iterator[None]] = {}  # started, but an earlier bucket is not
        self._running: list[Iterator[None]] = []
        self._launched = 0  # buckets 0 .. launched-1 have been sent
        self._begun: Counter[str] = Counter()  # buckets 0 .. begun[operation]-1 have begun an operation

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
        self._comm.wait_until(self._finished, self._spin_s)
        self._leave()
        self._forget()

    def _leave(self) -> None:  # noqa: B027  only where memory is shared
        """Returns when no other rank needs this one's arrays any more."""

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
    """What the ranks of a group exchange at the same time: the j-th node of each, or nothing where a rank has fewer.

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


class _Stage:
    """How ``n`` values of a bucket go through a group: every rank gets one segment of them, sums there what the group holds,
    and gives it back to the group.

    ``held``: the nodes that each rank of the job has sums of before the stage; ``sums``: those that this one has after it.
    """

    def __init__(self, group: Group, held: list[list[Node]], sums: list[Node], n: int, wire: Wire) -> None:
        lengths, nodes = segments(n, group.size, wire.unit), [held[rank] for rank in group.ranks]
        rounds = range(max(map(len, held)))  # also where this group needs fewer: every group starts as many operations
        self._group, self._sums, self._wire = group, sums, wire
        self._rounds = [_Round(j, group.rank, nodes, lengths, wire) for j in rounds]
        self._counts = [wire.nbytes(length) for length in lengths]
        self.own_length, self.nbytes = lengths[group.rank], wire.nbytes(n)  # of this rank's segment; of what is given back

    def scatter(self, sums: list[np.ndarray], what: str) -> list[Request]:
        """Starts giving every rank its segments of this rank's ``sums`` [n]; the messages stay alive with the requests."""
        nothing, requests = np.empty(0, np.uint8), []
        for j, of in enumerate(self._rounds):
            message = of.format.encode(sums[j]) if j < len(sums) else nothing
            requests.append(self._group.start_alltoall(message, of.send_counts, of.received, of.counts, what))
        return requests

    def fold(self) -> list[np.ndarray]:
        """The sums in this rank's segment, once all parts have arrived."""
        parts = {node: part for of in self._rounds for node, part in of.parts().items()}
        return [tree.fold(*node, lambda lo, hi: parts.get((lo, hi)), _add) for node in self._sums]

    def gather(self, message: np.ndarray, out: np.ndarray | None, what: str) -> Iterator[None]:
        """Joins the ranks' messages, which are sums in the wire's format, and returns them; with ``out`` [n] (float32) leaves
        there what they say.
        """
        received = np.empty(self.nbytes, np.uint8) if out is None else self._wire.room(out)
        yield from _ended([self._group.start_allgather(message, received, self._counts, what)])
        if out is not None:
            self._wire.decode(received, out)
        return received


class _SharedStage:
    """The same for ranks that see each other's ``leaves`` of the bucket: float32 [n] of each replica of the node.

    No lock is needed, because from the point where all have the parts to that where all have the sums only the rank that sums
    a segment touches it, in any leaf; and afterwards nobody writes until all have left.
    """

    def __init__(self, group: Group, held: list[list[Node]], sums: list[Node], leaves: dict[int, np.ndarray], wire: Wire,
                 shared: Shared) -> None:  # fmt: skip
        n = next(iter(leaves.values())).size
        bounds = np.cumsum([0, *segments(n, group.size, wire.unit)]).tolist()
        self._group, self._sums, self._wire, self._shared = group, sums, wire, shared
        own = slice(*bounds[group.rank : group.rank + 2])
        self.own_length = own.stop - own.start
        self._parts = {node: leaves[node[0]][own] for rank in group.ranks for node in held[rank]}
        first = [leaves[held[rank][0][0]] for rank in group.ranks]  # where each rank leaves what it has summed
        self._results = [(leaf[a:b], slice(a, b)) for leaf, (a, b) in zip(first, pairwise(bounds), strict=True)]
        self._result = self._results[group.rank][0]

    def scatter(self, sums: list[np.ndarray], what: str) -> list[Request]:
        """Says that this rank's ``sums`` are in its leaves."""
        return [self._group.start_shared("alltoall", self._shared, _PARTS, self._message_bytes, what)]

    def fold(self) -> list[np.ndarray]:
        """The sums in this rank's segment, when all ranks have theirs in their leaves."""
        if len(self._sums) > 1:
            return [tree.fold(*node, self._part, _add) for node in self._sums]
        (lo, hi) = self._sums[0]
        halves = [tree.fold(*half, self._part, _add) for half in ((lo, tree.middle(lo, hi)), (tree.middle(lo, hi), hi))]
        return [np.add(*halves, out=self._result)]

    def gather(self, message: np.ndarray, out: np.ndarray, what: str) -> Iterator[None]:
        """Leaves in ``out`` [n] what the ranks' messages say."""
        _move(self._wire.decode(message, self._result), self._result)
        yield from _ended([self._group.start_shared("allgather", self._shared, _SUMS, self._message_bytes, what)])
        for values, place in self._results:
            _move(values, out[place])

    def leave(self) -> Request:
        """Says that this rank needs the others' leaves no more."""
        return self._group.start_shared("allgather", self._shared, _LEFT, 0, "all to have the sums")

    @property
    def _message_bytes(self) -> int:
        return 4 * self.own_length

    def _part(self, lo: int, hi: int) -> np.ndarray | None:
        return self._parts.get((lo, hi))


class TreeAllreduce(Allreduce):
    """The sums are those of ``tree.fold``, bit for bit, for any number of ranks that divides ``replicas``. With a ``wire`` of
    16 bits each replica's contribution is rounded, and the sum: see `dpresnet.wire`.
    """

    def __init__(self, comm: Comm, replicas: int, buckets: Sequence[slice], wire: Wire = WIRES["fp32"],
                 commons: Commons | None = None) -> None:  # fmt: skip
        super().__init__(comm, replicas, buckets)
        self._wire, self._commons = wire, commons
        if odd := [n for n in self._lengths if n % wire.unit]:
            raise ValueError(f"a bucket of {odd[0]} values cannot travel as {wire.name}: use multiples of {wire.unit}")
        held = [tree.maximal_nodes(replicas, range(r * self._local, (r + 1) * self._local)) for r in range(comm.size)]
        lengths = self._lengths
        self._stages: list[tuple[_Stage, ...]] = [() for _ in lengths]
        for level, group in enumerate(comm.groups):
            joined = _joined(replicas, held, group.level)
            if commons and level == 0:
                stages = self._stages_in(commons, buckets, group, held, joined[comm.rank])
            else:
                stages = [_Stage(group, held, joined[comm.rank], n, wire) for n in lengths]
            self._stages = [(*before, stage) for before, stage in zip(self._stages, stages, strict=True)]
            held, lengths = joined, [stage.own_length for stage in stages]

    def _reduce(self, k: int, leaves: list[np.ndarray], out: np.ndarray) -> Iterator[None]:
        if self._commons or self._comm.size == 1 or len(leaves) > 1:  # otherwise they are rounded on their way
            for leaf in leaves:
                self._wire.round(leaf)
        sums = [self._partial_sum(node, leaves) for node in self._nodes]
        if self._comm.size == 1:
            self._wire.round(sums[0])
            if not np.may_share_memory(out, sums[0]):
                out[:] = sums[0]
            return
        stages = self._stages[k]
        for level, stage in enumerate(stages):
            yield from self._turn(k, f"scatter {level}")
            yield from _ended(stage.scatter(sums, f"the parts of bucket {k}"))
            sums = stage.fold()
        message = self._wire.encode(sums[0])
        for level, stage in reversed(list(enumerate(stages))):
            yield from self._turn(k, f"gather {level}")
            message = yield from stage.gather(message, None if level else out, f"the sum of bucket {k}")

    def _stages_in(self, commons: Commons, buckets: Sequence[slice], group: Group, held: list[list[Node]],
                   sums: list[Node]) -> list[_SharedStage]:  # fmt: skip
        """A stage for each bucket between ranks that have their gradient arenas in common."""
        replicas = [rank * self._local + j for rank in group.ranks for j in range(self._local)]
        whole = dict(zip(replicas, [arena.view(np.float32) for of in commons.arenas for arena in of], strict=True))
        leaves = [{replica: arena[bucket] for replica, arena in whole.items()} for bucket in buckets]
        return [_SharedStage(group, held, sums, of, self._wire, commons.shared) for of in leaves]

    @property
    def _spin_s(self) -> float:
        return SPIN_S if self._commons and len(self._comm.groups) == 1 else BULK_SPIN_S  # no message waits for polls

    def _leave(self) -> None:
        if self._commons:
            self._stages[0][0].leave().wait()

    def _turn(self, k: int, operation: str) -> Iterator[None]:
        """Ends when all buckets before ``k`` have begun an operation: buckets share its communicator, so on every rank they
        have to begin it in the order of the plan, though what comes before it may end in another.
        """
        while self._begun[operation] < k:
            yield
        self._begun[operation] += 1


def _ended(requests: list[Request]) -> Iterator[None]:
    """Ends when they have."""
    while not all([request.test() for request in requests]):  # a list: each is to be tested
        yield


def _joined(replicas: int, held: list[list[Node]], level: Level) -> list[list[Node]]:
    """The maximal nodes of each rank when the ranks of every group have put together the nodes that they ``held``."""
    joined = list(held)
    for ranks in level:
        owned = sorted(replica for rank in ranks for node in held[rank] for replica in range(*node))
        nodes = tree.maximal_nodes(replicas, owned)
        for rank in ranks:
            joined[rank] = nodes
    return joined


def _move(values: np.ndarray, out: np.ndarray) -> None:
    """Copies them, unless they are there."""
    if values.ctypes.data != out.ctypes.data:
        out[:] = values


def allreduce(comm: Comm, replicas: int, buckets: Sequence[slice], reduce: str = "tree", wire: str = "fp32",
              commons: Commons | None = None) -> Allreduce:  # fmt: skip
    """By the names of ``--reduce`` and ``--wire``; ``commons`` hold the gradients if those lie in memory that ranks share."""
    if reduce == "mpi":
        return MpiAllreduce(comm, replicas, buckets)
    return TreeAllreduce(comm, replicas, buckets, WIRES[wire], commons)
