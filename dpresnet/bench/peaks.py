"""What the device can do at best, by kernels/probe.cl: multiply-adds in registers, and streams through memory and cache."""

from __future__ import annotations

import numpy as np
import pyopencl as cl

from dpresnet.bench import facts
from dpresnet.device import Device

CHAINS = 12  # of kernels/probe.cl
CHAIN_ROUNDS = 200_000
GROUPS_PER_UNIT = 8  # so that units which are late get fewer
ARRAYS = 3  # of probe_stream
VECTORS_PER_ITEM = 1024  # of probe_stream on a CPU
LARGEST = 6.0  # bytes of all arrays of a stream, in last-level caches
REPEATS = 5
UNKNOWN_CACHE = 2**25


def last_level_cache(device: Device) -> int:
    """Bytes of the largest cache in front of the device's memory."""
    seen = [device.cl.global_mem_cache_size, *(facts.caches().values() if device.host_memory else ())]
    return max(seen) or UNKNOWN_CACHE


class Probes:
    """The peaks of one device. ``cache_bytes`` is the size of its last-level cache."""

    def __init__(self, device: Device):
        self.device, self.cache_bytes = device, last_level_cache(device)
        self._items = VECTORS_PER_ITEM if device.host_memory else 1
        self._chains = GROUPS_PER_UNIT * device.compute_units * (1 if device.vector > 1 else 256)
        self._fma = cl.Kernel(device.program("probe", VEC=device.vector), "probe_peak")
        self._out = device.arena(4 * 16 * (self._chains + 1))
        self._stream = cl.Kernel(device.program("probe", VEC=device.vector, ITEMS=self._items), "probe_stream")
        self._arrays = [device.arena(int(LARGEST * self.cache_bytes) // ARRAYS) for _ in range(ARRAYS)]
        for array in self._arrays:  # pages that nobody has written are one page of zeros, always in the cache
            cl.enqueue_fill_buffer(device.queue, array.buffer(0, array.nbytes), np.float32(1), 0, array.nbytes)
        self.fma()
        device.finish()

    def fma(self) -> cl.Event:
        """Enqueues multiply-adds on all compute units; `fma_rate` tells from the event how fast they were."""
        self._fma.set_args(self._out.buffer(0, self._out.nbytes), np.int32(CHAIN_ROUNDS))
        return self.device.enqueue(self._fma, (self._chains,))

    def fma_rate(self, seconds: float) -> float:
        """Operations per second of one `fma` that took this long."""
        return 2 * CHAINS * self.device.vector * CHAIN_ROUNDS * self._chains / seconds

    def stream(self, share_of_cache: float) -> list[tuple[int, cl.Event]]:
        """Enqueues passes over arrays of so many last-level caches in all; bytes and event of each but the first."""
        grain = 4 * self.device.vector * self._items
        nbytes = max(grain, int(share_of_cache * self.cache_bytes) // ARRAYS // grain * grain)
        elements, buffers = np.int32(nbytes // 4), [array.buffer(0, nbytes) for array in self._arrays]
        self._stream.set_args(elements, *buffers, np.float32(0.5))
        events = [self.device.enqueue(self._stream, (nbytes // grain,)) for _ in range(1 + REPEATS)]
        return [(ARRAYS * nbytes, event) for event in events[1:]]
