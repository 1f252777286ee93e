"""Batch-norm statistics that replicas share while a plan is replayed, and the running statistics that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from dpresnet.comm import Comm
from dpresnet.exchange import TreeExchange, add, merge_moments
from dpresnet.ops.batchnorm import EPS
from dpresnet.plan import Exchange
from dpresnet.replicas import Replicas

RUNNING_MOMENTUM = 0.1  # of the running statistics


class Rows:
    """What an exchange takes from the replicas of this rank and what it brings them.

    ``values`` [replicas, 1 + 2 C]: count, and two numbers for each of the C channels in all layers of the exchange. Its views
    are made once: between two kernels, which leave nothing else in the caches, every call from Python is slow.
    """

    def __init__(self, entry: Exchange, replicas: Replicas):
        self.what = f"{entry.kind} of {entry.name}"
        self.values = np.empty((len(replicas.all), 1 + entry.size))
        self._pixels, self._distant = entry.pixels, not replicas.device.host_memory
        self._taken, self._brought = [], []
        for replica, row in zip(replicas.all, self.values, strict=True):
            memory, channels = replica.memory, row[1:].reshape(2, -1)
            self._taken += [(memory, source, memory.view(source), channels[:, layer])
                            for source, layer in zip(entry.sources, entry.columns, strict=True)]  # fmt: skip
            self._brought.append([(memory, target, memory.view(target), layer)
                                  for target, layer in zip(entry.targets, entry.columns, strict=True)])  # fmt: skip

    def begin(self, valid: np.ndarray) -> None:
        """Before a micro-batch of ``valid`` images of each replica."""
        self.values[:, 0] = valid * self._pixels

    def take(self) -> np.ndarray:
        """``values`` as the kernels have left them."""
        for memory, source, view, values in self._taken:
            if self._distant:
                memory.read(source)
            values[...] = view
        return self.values

    def bring(self, members: slice, result: np.ndarray) -> None:
        """Writes the result [2, C] for each of some replicas."""
        for targets in self._brought[members]:
            for memory, target, view, layer in targets:
                view[...] = result[:, layer]
                if self._distant:
                    memory.push(target)


class SyncBN:
    """The statistics of ``replicas``, of which there are ``total`` over the ranks of ``comm``; ``group`` neighbouring ones
    normalise with common statistics.
    """

    def __init__(self, replicas: Replicas, comm: Comm, total: int, group: int):
        self.replicas, self.comm = replicas, comm
        self._over_all, self._over_groups = TreeExchange(comm, total), TreeExchange(comm, total, group)
        self._apart = group < total  # running statistics are not what a replica normalises with
        self.alone = replicas.device.doubles and group == 1  # replicas normalise without the host
        plan = replicas.model.train.plan
        self._rows = {entry: Rows(entry, replicas) for entry in plan if isinstance(entry, Exchange)}
        self.forget()

    def forget(self) -> None:
        """Before the first micro-batch of a step."""
        self._merged: dict[Exchange, np.ndarray] = {}  # statistics of the present micro-batch, of all replicas
        self._pending: list[dict[Exchange, np.ndarray]] = []  # those of each that is over

    def begin(self, valid: Sequence[int]) -> None:
        """Before a micro-batch of ``valid`` images of each replica of this rank."""
        for rows in self._rows.values():
            rows.begin(np.array(valid))

    def agree(self, entry: Exchange) -> None:
        """Combines the entry's values, which are there, over the replicas and writes the result for each."""
        rows, statistics = self._rows[entry], entry.kind == "statistics"
        self.comm.events.what = rows.what
        roots = self._over_groups.combine_groups(rows.take(), merge_moments if statistics else add)
        for root, members in zip(roots, self._over_groups.members, strict=True):
            rows.bring(members, moments(root) if statistics else means(root))
        if statistics and not self._apart:
            self._merged[entry] = roots[0].copy()

    def close(self) -> None:
        """After a micro-batch: keeps its statistics until the step is known to count."""
        if self._apart or self.alone:
            self._merge_all()
        self._pending.append(self._merged)
        self._merged = {}

    def _merge_all(self) -> None:
        """Running statistics are those of the global batch also where replicas normalise apart: one exchange for all layers,
        of what the device still holds.
        """
        entries = [entry for entry in self._rows if entry.kind == "statistics"]
        rows = np.concatenate([self._rows[entry].take() for entry in entries], axis=1)
        ends = np.cumsum([1 + entry.size for entry in entries]).tolist()
        parts = [slice(begin, end) for begin, end in pairwise([0, *ends])]

        def combine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            return np.concatenate([merge_moments(left[part], right[part]) for part in parts])

        self.comm.events.what = "running statistics"
        merged = self._over_all.combine(rows, combine)
        self._merged = {entry: merged[part] for entry, part in zip(entries, parts, strict=True)}

    def commit(self) -> None:
        """running = 0.9 running + 0.1 batch, with the unbiased variance (Ioffe and Szegedy 2015, algorithm 2), for each
        micro-batch in order.

        Nothing happens after a pass that overflowed. The device updates the parameters meanwhile.
        """
        self.close()
        if not all(np.isfinite(row).all() for merged in self._pending for row in merged.values()):
            return
        for merged in self._pending:
            for entry, row in merged.items():
                values = row[1:].reshape(2, -1)
                for name, layer in zip(entry.names, entry.columns, strict=True):
                    self._follow(name, row[0], *values[:, layer])

    def _follow(self, name: str, count: float, mean: np.ndarray, m2: np.ndarray) -> None:
        """Moves the running statistics of a layer towards those of a batch."""
        for suffix, value in (("running_mean", mean), ("running_var", m2 / max(count - 1, 1))):
            buffer = self.replicas.model.state.buffers[f"{name}.{suffix}"]
            old = self.replicas.buffer(f"{name}.{suffix}")
            full = self.replicas.memory.view(buffer.value)
            full[: buffer.channels] = (1 - RUNNING_MOMENTUM) * old + RUNNING_MOMENTUM * value[: buffer.channels]
            self.replicas.memory.write(buffer.value, full)


def moments(row: np.ndarray) -> np.ndarray:
    """[2, C] = mean and 1 / sqrt(variance + eps) from a row [count, mean, M2]; zeros for none."""
    result = row[1:].reshape(2, -1).copy()
    if row[0] > 0:
        variance = result[1]
        variance /= row[0]
        variance += EPS
        np.sqrt(variance, out=variance)
        np.divide(1, variance, out=variance)
    return result


def means(row: np.ndarray) -> np.ndarray:
    """[2, C] from a row [count, sums]; zeros for none."""
    return row[1:].reshape(2, -1) / max(row[0], 1.0)
