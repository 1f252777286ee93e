"""Process-wide settings that OpenCL runtimes read once, while they are loaded.

Programs call `prepare` before anything imports pyopencl; afterwards the settings have no effect. MPI tells which ranks
share a node, so the order in a program is: connect, prepare, import the OpenCL side.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpresnet.errors import Refused

THREAD_VARIABLES = (
    "POCL_MAX_PTHREAD_COUNT",  # PoCL 3
    "POCL_CPU_MAX_CU_COUNT",  # later PoCL
    "DPCPP_CPU_NUM_CUS",  # Intel's CPU runtime
)


def prepare(threads: int, local_rank: int, local_size: int) -> None:
    """Sets up this process, one of ``local_size`` on its node, to compute with ``threads`` CPU threads.

    With ``threads`` 0 the usable cores are divided among the ranks of the node, and what the user has set in the
    environment stands; a number given is meant for this run and goes before it. POCL_AFFINITY is left alone: it would
    pin thread i of every rank to core i. Raises RuntimeError if pyopencl is loaded and would not follow.
    """
    if threads < 0 or not 0 <= local_rank < local_size:
        raise ValueError(f"impossible: {threads} threads, local rank {local_rank} of {local_size}")
    settings = {name: str(threads or default_threads(local_size)) for name in THREAD_VARIABLES}
    if not threads:
        settings |= {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    if "pyopencl" in sys.modules:
        _check_in_force(settings)
    os.environ.update(settings)
    # pyopencl's own cache takes a lock that a killed process leaves behind: the next one waits a minute, then fails
    os.environ.setdefault("PYOPENCL_NO_CACHE", "1")
    os.environ["POCL_CACHE_DIR"] = str(kernel_cache())


def prepare_rank(comm: Any, threads: int, bound: bool = True) -> None:
    """`prepare` and, if wanted, `bind` for this rank of a job; collective over the ranks of ``comm``."""
    prepare(threads, comm.local_rank, comm.local_size)
    if bound:
        bind(comm.gather((comm.host, own_cores())), comm.rank, threads)


def _check_in_force(settings: dict[str, str]) -> None:
    """Raises RuntimeError unless a runtime that read the environment as it is now has as many threads as asked."""
    everything = str(usable_cores())
    for name, value in settings.items():
        current = os.environ.get(name, everything)
        if current != value:
            raise RuntimeError(
                f"pyopencl is already loaded with {current} threads, {value} are asked for: "
                f"call dpresnet.environment.prepare before the first import of pyopencl, or set {name}={value}"
            )


def bind(everyone: Sequence[tuple[str, frozenset[int]]], rank: int, threads: int = 0) -> None:
    """Keeps this process, ``rank`` of a job whose ranks have these (host, cores), to its share of its cores.

    The threads of a rank that waits for others would otherwise take turns with those of a rank that computes. Nothing happens
    where a launcher has given the ranks of a host different cores, or where there are fewer cores in a share than ``threads``.
    """
    host, cores = everyone[rank]
    peers = [r for r, (other, theirs) in enumerate(everyone) if other == host and theirs & cores]
    share = len(cores) // max(1, len(peers))
    if len(peers) > 1 and share >= max(1, threads) and all(everyone[r][1] == cores for r in peers):
        place = peers.index(rank) * share
        os.sched_setaffinity(0, sorted(cores, key=place_of)[place : place + share])


def place_of(core: int) -> tuple[int, int, int]:
    """Neighbours in this order share caches and memory: its processor, its physical core, its number."""
    folder = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text()), core
    except (OSError, ValueError):
        return 0, core, core


def own_cores() -> frozenset[int]:
    """Where this process may run; empty where a system does not tell."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def usable_cores() -> int:
    """Cores that this process may run on; fewer than the machine has when a launcher or a container binds it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads(local_size: int) -> int:
    """Threads per rank when ``local_size`` ranks divide the usable cores of a node."""
    return max(1, usable_cores() // local_size)


def kernel_cache() -> Path:
    """The folder where PoCL keeps compiled kernels; the ranks of a node share it, so that each kernel compiles once.

    It is PoCL's usual one, or POCL_CACHE_DIR. Without a home folder to write to (batch nodes, containers) it is a
    private folder under TMPDIR. Refused if others may write there: what lies in it is executed.
    """
    if chosen := os.environ.get("POCL_CACHE_DIR"):
        try:
            Path(chosen).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"POCL_CACHE_DIR={chosen} cannot be written ({error.strerror}): name another, or unset it") from None
        return Path(chosen)
    usual = _usual_cache()
    if usual and writable(usual):
        return usual
    private = Path(tempfile.gettempdir(), f"dpresnet-pocl-{os.getuid()}")
    private.mkdir(mode=0o700, exist_ok=True)
    status = private.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise Refused(f"kernel cache {private} is open to other users: remove it, or set POCL_CACHE_DIR to another")
    return private


def _usual_cache() -> Path | None:
    """Where PoCL would put its cache by itself."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base, "pocl", "kcache")
    if home := os.environ.get("HOME"):
        return Path(home, ".cache", "pocl", "kcache")
    return None


def writable(folder: Path) -> bool:
    """Whether files can be created in ``folder``, or it can be created with its missing parents."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def intel_vendors() -> Path | None:
    """The value of OCL_ICD_VENDORS that makes Intel's CPU runtime the only platform; None where it is not installed.

    The loader takes a library in place of a folder of .icd files. That avoids the wheel's own .icd file, which names a
    path of the machine where it was built, and hides PoCL, which pyopencl's wheel adds to every folder.
    """
    library = Path(sys.prefix, "lib", "libintelocl.so")
    return library if library.is_file() else None
