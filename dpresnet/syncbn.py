"""Batch-norm statistics that replicas share while a plan is replayed, and the running statistics that follow them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpresnet.comm import Comm
from dpresnet.exchange import TreeExchange, add, merge_moments
from dpresnet.ops.batchnorm import EPS
from dpresnet.plan import Exchange
from dpresnet.replicas import Replicas

RUNNING_MOMENTUM = 0.1  # of the running statistics


class SyncBN:
    """The statistics of ``replicas``, of which there are ``total`` over the ranks of ``comm``; ``group`` neighbouring ones
    normalise with common statistics.
    """

    def __init__(self, replicas: Replicas, comm: Comm, total: int, group: int):
        self.replicas, self.comm = replicas, comm
        self._over_all, self._over_groups = TreeExchange(comm, total), TreeExchange(comm, total, group)
        self._apart = group < total  # running statistics are not what a replica normalises with
        self.alone = replicas.device.doubles and group == 1  # replicas normalise without the host
        self._valid: list[int] = []
        self.forget()

    def forget(self) -> None:
        """Before the first micro-batch of a step."""
        self._pending: list[dict[Exchange, np.ndarray]] = []  # merged statistics of each micro-batch of this step
        self._moments: dict[Exchange, np.ndarray] = {}  # those of the present one
        self._local: dict[Exchange, list[np.ndarray]] = {}  # of groups: those of each replica

    def begin(self, valid: Sequence[int]) -> None:
        """Before a micro-batch of ``valid`` images of each replica of this rank."""
        self._valid = list(valid)

    def agree(self, entry: Exchange) -> None:
        """Combines the entry's values, which are there, over the replicas and writes the result for each."""
        self.comm.events.what = f"{entry.kind} of {entry.name}"
        rows, combine = self._rows(entry), merge_moments if entry.kind == "statistics" else add
        merged = self._over_groups.combine_groups(rows, combine)
        for replica, row in zip(self.replicas.all, merged, strict=True):
            count, values = row[0], row[1:].reshape(2, -1)
            result = moments(count, *values) if entry.kind == "statistics" else values / max(count, 1.0)
            for target, layer in zip(entry.targets, entry.columns, strict=True):
                replica.memory.write(target, result[:, layer])
        if entry.kind == "statistics":
            self._keep(entry, rows if self._apart else merged)

    def _rows(self, entry: Exchange) -> list[np.ndarray]:
        """[count, 2 C values] of each replica of this rank, C channels in all layers of the entry."""
        rows = [np.empty(1 + entry.size) for _ in self.replicas.all]
        for row, replica, valid in zip(rows, self.replicas.all, self._valid, strict=True):
            row[0], values = valid * entry.pixels, row[1:].reshape(2, -1)
            for source, layer in zip(entry.sources, entry.columns, strict=True):
                values[:, layer] = replica.memory.fetch(source)
        return rows

    def _keep(self, entry: Exchange, rows: list[np.ndarray]) -> None:
        """For the running statistics: [count, mean, M2] of each replica, or all the same where all replicas share them."""
        self._moments[entry] = rows[0]
        if self._apart:
            self._local[entry] = rows

    def close(self) -> None:
        """After a micro-batch: keeps its statistics until the step is known to count."""
        if self.alone:
            for entry in self.replicas.model.train.plan:
                if isinstance(entry, Exchange) and entry.kind == "statistics":
                    self._keep(entry, self._rows(entry))
        if self._local:
            self._merge_local()
        self._pending.append(self._moments)
        self._moments, self._local = {}, {}

    def _merge_local(self) -> None:
        """Running statistics are those of the global batch also where groups normalise apart: one exchange for all layers."""
        widths = [1 + entry.size for entry in self._local]
        rows = [np.concatenate(parts) for parts in zip(*self._local.values(), strict=True)]
        parts = [slice(end - width, end) for width, end in zip(widths, np.cumsum(widths), strict=True)]

        def combine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            return np.concatenate([merge_moments(left[part], right[part]) for part in parts])

        self.comm.events.what = "running statistics"
        merged = self._over_all.combine(rows, combine)
        self._moments = {entry: merged[part] for entry, part in zip(self._local, parts, strict=True)}

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


def moments(count: float, mean: np.ndarray, m2: np.ndarray) -> np.ndarray:
    """[2, C] = mean and 1 / sqrt(variance + eps) of ``count`` values per channel; zeros for none."""
    result = np.zeros((2, mean.size))
    if count > 0:
        result[0], result[1] = mean, 1 / np.sqrt(m2 / count + EPS)
    return result
