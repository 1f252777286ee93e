"""The OpenCL device of this process: choosing it, building kernels for it, and memory that MPI can reach.

Everything above this module speaks of arenas (large contiguous allocations) and programs (a kernel stem compiled with
some defines); only here are platforms, build options and memory flags known.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from contextlib import suppress
from functools import cache, cached_property
from importlib.resources import files

import numpy as np
import pyopencl as cl

from dpresnet import pocl, tiles
from dpresnet.errors import Refused

BLOCK = 16  # neighbouring channels stored together, see kernels/common.cl
HEADERS = {  # of sources, beside common.cl
    "conv": ("tile", "convolution", "packing"), "winograd": ("tile", "transform"), "augment": ("view",), "loss": ("view",),
}  # fmt: skip
TUNED = ("conv", "winograd")  # stems whose kernels have sizes that can be measured, see `dpresnet.tiles`
LAST_LEVEL_BYTES = 16 * 2**20  # what is larger is not expected in a cache when it is read again
ALIGNMENT = 512  # bytes; satisfies the sub-buffer rule of every vendor (at most 4096 bits)


def list_devices() -> list[cl.Device]:
    """All OpenCL devices, the best first: GPUs and accelerators before CPUs, otherwise in the loader's order."""
    devices = []
    try:
        for platform in cl.get_platforms():
            with suppress(cl.Error):  # a broken driver does not hide the others
                devices += platform.get_devices()
    except cl.Error:  # none at all
        return []
    return sorted(devices, key=is_cpu)


def is_cpu(device: cl.Device) -> bool:
    """Whether arenas on this device are host memory."""
    return bool(device.type & cl.device_type.CPU)


def candidates(selector: str = "auto") -> list[cl.Device]:
    """The devices that the ranks of a node share out, by local rank modulo their number.

    ``auto`` gives those of the best platform that are of its best kind; an index counts the list that
    ``python -m dpresnet.doctor`` prints; anything else is part of a device or platform name.
    """
    devices = list_devices()
    if not devices:
        raise Refused("no OpenCL device found; install a vendor's driver, or the CPU runtime: pip install 'dpresnet[local]'")
    if selector == "auto":
        best = devices[0]
        return [d for d in devices if d.platform == best.platform and is_cpu(d) == is_cpu(best)]
    names = ", ".join(f"{i}: {device.name.strip()}" for i, device in enumerate(devices))
    if selector.isdigit():
        if int(selector) >= len(devices):
            raise Refused(f"--device {selector}: there are {len(devices)} devices ({names})")
        return [devices[int(selector)]]
    matching = [d for d in devices if selector.lower() in f"{d.platform.name} {d.name}".lower()]
    if not matching:
        raise Refused(f"--device {selector}: no device has that in its name ({names})")
    return matching


def choose_device(selector: str = "auto", local_rank: int = 0) -> cl.Device:
    """The device of a rank, see `candidates`."""
    devices = candidates(selector)
    return devices[local_rank % len(devices)]


def kernel_source(stem: str) -> str:
    """The text of kernels/<stem>.cl with its headers in front."""
    folder = files("dpresnet.kernels")
    return "\n".join((folder / f"{name}.cl").read_text() for name in ("common", *HEADERS.get(stem, ()), stem))


@cache
def tuned_kernels() -> str:
    """A digest of the sources that tuned sizes are measured with."""
    return hashlib.sha256("".join(map(kernel_source, TUNED)).encode()).hexdigest()[:12]


class BuildError(RuntimeError):
    """A kernel did not compile; the message holds the options and the compiler's log."""


class Device:
    """One OpenCL device with an in-order queue, its compiled programs and how it computes.

    ``vector`` is the number of lanes its kernels use (see VEC in kernels/common.cl): 16 on CPUs with AVX-512, 8 on others, 1
    (work-items are lanes) elsewhere; or what is asked for, at most that. ``host_memory`` tells whether arenas are ordinary
    host memory that numpy and MPI use in place.
    """

    def __init__(self, cl_device: cl.Device, profile: bool = False, vector: int = 0):
        self.cl = cl_device
        self._asked = vector
        pocl.name_cpu(cl_device)
        self.context = cl.Context([cl_device])
        self._use_queue(profile)
        self.host_memory = is_cpu(cl_device)
        self._programs: dict[str, cl.Program] = {}

    @property
    def name(self) -> str:
        """Device, platform and driver in one line."""
        return f"{self.cl.name.strip()} ({self.cl.platform.name.strip()}, driver {self.cl.driver_version.strip()})"

    @property
    def name_with_lanes(self) -> str:
        """What figures depend on: device, platform, driver, and how wide its vectors are here."""
        return f"{self.name}, {self.vector} lanes"

    @property
    def tuning_name(self) -> str:
        """What measured sizes belong to: device and driver, how many work-groups run at once, lanes."""
        return f"{self.name}, {self.compute_units} units, {self.vector} lanes"

    @cached_property
    def tuned(self) -> tiles.Tuned:
        """Sizes of the convolution kernels that `dpresnet.tune` has measured on this device."""
        return tiles.tuned(self.tuning_name, tuned_kernels())

    @cached_property
    def vector(self) -> int:
        """Lanes of a vector. Refused if more are asked for than the device has, or a number without kernels."""
        widest = 1 if not self.host_memory else 16 if self.cl.native_vector_width_float >= 16 else 8
        if self._asked not in (0, 1, 8, 16) or self._asked > widest:
            raise Refused(f"vectors of {self._asked} lanes on {self.name}: choose 1, 8 or 16, at most {widest}")
        return self._asked or widest

    @cached_property
    def doubles(self) -> bool:
        """Whether kernels may compute in double precision."""
        return "cl_khr_fp64" in self.cl.extensions.split()

    @property
    def compute_units(self) -> int:
        """Work-groups that run at once."""
        return self.cl.max_compute_units

    @property
    def local_bytes(self) -> int:
        """Local memory of one work-group."""
        return self.cl.local_mem_size

    def program(self, stem: str, **defines: int) -> cl.Program:
        """Compiles kernels/<stem>.cl with the defines once per process; drivers and PoCL keep their own disk cache."""
        options = [f"-D{name}={value}" for name, value in sorted(defines.items())]
        key = " ".join([stem, *options])
        if key not in self._programs:
            source = kernel_source(stem)
            wide = self.vector == 16 and pocl.is_pocl(self.cl)
            self._programs[key] = self._build(key, pocl.for_avx512(source) if wide else source, options)
        return self._programs[key]

    def _build(self, key: str, source: str, options: list[str]) -> cl.Program:
        digest = hashlib.sha256(f"{key} {source}".encode()).hexdigest()[:12]
        program = cl.Program(self.context, f"// {digest}\n{source}")
        try:
            with warnings.catch_warnings(action="ignore", category=cl.CompilerWarning):
                return program.build(options)
        except cl.Error as error:
            raise BuildError(f"kernels/{key} for {self.name}:\n{error}") from None

    def arena(self, nbytes: int, host: np.ndarray | None = None) -> Arena:
        """Allocates zeroed memory of at least one byte; on a device with ``host_memory`` it may be that of ``host``, uint8 on
        a page boundary.
        """
        return Arena(self, max(ALIGNMENT, nbytes), host)

    def enqueue(self, kernel: cl.Kernel, size: tuple[int, ...]) -> cl.Event:
        """Starts a kernel. On a CPU a work-item is a task of its own; elsewhere the driver groups them."""
        return cl.enqueue_nd_range_kernel(self.queue, kernel, size, (1,) * len(size) if self.host_memory else None)

    def finish(self) -> None:
        """Waits until everything enqueued is done."""
        self.queue.finish()

    def record_times(self, wanted: bool) -> None:
        """Whether commands record from now on when they ran; waits for those before."""
        self.finish()
        self._use_queue(wanted)

    def _use_queue(self, profile: bool) -> None:
        properties = cl.command_queue_properties.PROFILING_ENABLE if profile else 0
        self.queue = cl.CommandQueue(self.context, properties=properties)


class Arena:
    """A contiguous allocation that kernels see through sub-buffers and the host through numpy views.

    On a CPU both are the same memory. Elsewhere the host side is a pinned mirror, and `pull` / `push` copy ranges.
    """

    def __init__(self, device: Device, nbytes: int, host: np.ndarray | None = None):
        self.device, self.nbytes = device, nbytes
        flags = cl.mem_flags
        try:
            if device.host_memory:
                self._host = aligned_bytes(nbytes) if host is None else host[:nbytes]
                self._buffer = cl.Buffer(device.context, flags.READ_WRITE | flags.USE_HOST_PTR, hostbuf=self._host)
            else:
                self._buffer = cl.Buffer(device.context, flags.READ_WRITE, nbytes)
                self._pinned = cl.Buffer(device.context, flags.READ_WRITE | flags.ALLOC_HOST_PTR, nbytes)
                access = cl.map_flags.READ | cl.map_flags.WRITE
                self._host, _ = cl.enqueue_map_buffer(device.queue, self._pinned, access, 0, (nbytes,), np.uint8)
                self._host[:] = 0
                self.push(0, nbytes)
        except (cl.Error, MemoryError) as error:
            limit = device.cl.max_mem_alloc_size / 2**20
            raise Refused(
                f"{device.name} cannot allocate {nbytes / 2**20:.0f} MiB in one piece (limit {limit:.0f} MiB): {error}; "
                "use a smaller --batch, --image or network, or more ranks"
            ) from None
        self._parts: dict[tuple[int, int], cl.Buffer] = {}

    def __del__(self) -> None:
        # Kernels that are still running may write here, and the driver does not know who owns host memory.
        self.device.finish()

    def buffer(self, offset: int, nbytes: int) -> cl.Buffer:
        """The device side of a range; the same object for the same range."""
        key = (offset, nbytes)
        if key not in self._parts:
            self._parts[key] = self._buffer.get_sub_region(offset, nbytes)
        return self._parts[key]

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """The host side of a range. Valid after `finish` on a CPU, after `pull` elsewhere."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self._host[offset : offset + nbytes].view(dtype).reshape(shape)

    def pull(self, offset: int, nbytes: int) -> None:
        """Waits for the device and makes the host side of a range current."""
        if self.device.host_memory:
            self.device.finish()
        else:
            host = self._host[offset : offset + nbytes]
            cl.enqueue_copy(self.device.queue, host, self._buffer, src_offset=offset, is_blocking=True)

    def push(self, offset: int, nbytes: int) -> None:
        """Makes the device side of a range current."""
        if not self.device.host_memory:
            host = self._host[offset : offset + nbytes]
            cl.enqueue_copy(self.device.queue, self._buffer, host, dst_offset=offset, is_blocking=True)


def aligned_bytes(nbytes: int) -> np.ndarray:
    """Zeroed bytes on a page boundary: what kernels may address with aligned vectors and MPI may reduce in place."""
    page = os.sysconf("SC_PAGESIZE")
    raw = np.zeros(nbytes + page, np.uint8)
    start = -raw.ctypes.data % page
    return raw[start : start + nbytes]
