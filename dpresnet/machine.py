"""Facts about this machine, for the doctor: OpenCL drivers and devices, MPI library and mpirun, HDF5, cores.

Each library is loaded in a child process (``python -m dpresnet.machine PROBE`` prints JSON), because a broken one may
end or hang the process that loads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpresnet import environment
from dpresnet.errors import Refused

CHILD_LIMIT_S = 60
ROOT_PERMISSION = "OMPI_ALLOW_RUN_AS_ROOT"
SETTINGS = (*environment.THREAD_VARIABLES, "POCL_AFFINITY", "POCL_CACHE_DIR", "OCL_ICD_VENDORS", ROOT_PERMISSION)
TRIAL = "from mpi4py import MPI; print(f'<{MPI.COMM_WORLD.size}>', flush=True)"
TRIAL_SETTINGS = {  # Open MPI 4 and 5: two processes, even on one core and as root
    "OMPI_MCA_rmaps_base_oversubscribe": "true",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    ROOT_PERMISSION: "1",
    f"{ROOT_PERMISSION}_CONFIRM": "1",
}


@dataclass(frozen=True)
class Launcher:
    """An mpirun, and what a trial with two processes gave: the size of COMM_WORLD in each, or the error."""

    path: str
    version: str
    sizes: tuple[int, ...] = ()
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether processes started by it find each other through mpi4py's library."""
        return self.sizes == (2, 2)


@dataclass(frozen=True)
class Facts:
    """What `gather` found. ``opencl``, ``compiler``, ``mpi``, ``hdf5``: the result of a probe, or {"error": reason}."""

    ranks: int
    cores: int
    root: bool
    settings: Mapping[str, str]  # the variables of SETTINGS that are set
    drivers: Mapping[str, bool]  # registered driver -> whether its library is there
    opencl: Mapping[str, Any]
    compiler: Mapping[str, Any]
    mpi: Mapping[str, Any]
    hdf5: Mapping[str, Any]
    launchers: tuple[Launcher, ...]  # first the one that a shell would start
    cache: str
    cache_error: str


def gather(ranks: int) -> Facts:
    """Looks at this machine with ``ranks`` ranks in mind; starts child processes and takes a few seconds."""
    cache, cache_error = _kernel_cache()
    return Facts(
        ranks=ranks,
        cores=environment.usable_cores(),
        root=os.geteuid() == 0,
        settings={name: os.environ[name] for name in SETTINGS if name in os.environ},
        drivers=registered_drivers(),
        launchers=tuple(try_launcher(path) for path in launcher_paths()),
        cache=cache,
        cache_error=cache_error,
        **{name: ask(name) for name in PROBES},
    )


def _kernel_cache() -> tuple[str, str]:
    try:
        return str(environment.kernel_cache()), ""
    except Refused as error:
        return "", str(error)


def registered_drivers() -> dict[str, bool]:
    """The drivers that OCL_ICD_VENDORS or the usual folder name, and whether they are there.

    A driver is an .icd file, or a library where OCL_ICD_VENDORS names that directly. A library without a path is left
    to the system to find. Drivers that pyopencl's wheel brings along (PoCL) need no registration.
    """
    place = Path(os.environ.get("OCL_ICD_VENDORS") or "/etc/OpenCL/vendors")
    if not place.is_dir() and place.suffix != ".icd":
        return {str(place): place.exists()} if "OCL_ICD_VENDORS" in os.environ else {}
    files = sorted(place.glob("*.icd")) if place.is_dir() else [place]
    libraries = {str(file): Path(file.read_text().strip()) for file in files}
    return {file: library.exists() or not library.is_absolute() for file, library in libraries.items()}


# ---- probes: what a child process reports


def probe_opencl() -> dict[str, Any]:
    """Platforms, and devices in the order in which ``--device`` counts them."""
    import pyopencl as cl

    from dpresnet.device import list_devices

    try:
        platforms = [f"{platform.name.strip()} ({platform.version.strip()})" for platform in cl.get_platforms()]
    except cl.Error:
        platforms = []
    devices = [
        {
            "name": device.name.strip(),
            "platform": device.platform.name.strip(),
            "driver": device.driver_version.strip(),
            "kind": "CPU" if device.type & cl.device_type.CPU else "GPU or accelerator",
            "units": device.max_compute_units,
            "lanes": device.native_vector_width_float,
        }
        for device in list_devices()
    ]
    return {"platforms": platforms, "devices": devices, "pyopencl": cl.VERSION_TEXT}


def probe_compiler() -> dict[str, Any]:
    """Builds and runs a small kernel on the device that training chooses by itself."""
    import numpy as np
    import pyopencl as cl

    from dpresnet.device import BLOCK, Device, choose_device

    device = Device(choose_device())
    memory = [device.arena(4 * BLOCK) for _ in range(3)]
    a, b, y = (array.view(0, (BLOCK,), np.float32) for array in memory)
    a[:], b[:] = np.arange(BLOCK), 1
    for array in memory:
        array.push(0, 4 * BLOCK)
    kernel = cl.Kernel(device.program("residual", HALF=0, VEC=device.vector), "residual_add")
    kernel.set_args(np.int32(BLOCK), *(array.buffer(0, 4 * BLOCK) for array in memory))
    device.enqueue(kernel, (BLOCK // device.vector,))
    memory[2].pull(0, 4 * BLOCK)
    if not np.array_equal(y, a + b):
        raise RuntimeError(f"wrong result of a kernel on {device.name}: {a} + {b} gave {y}")
    return {"device": device.name, "lanes": device.vector, "tuned": str(device.tuned)}


def probe_mpi() -> dict[str, Any]:
    """The MPI library that mpi4py loads."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    first = MPI.Get_library_version().splitlines()[0]
    return {"library": " ".join(first.split(",")[0].replace("Version:", "").split()), "mpi4py": mpi4py.__version__}


def probe_hdf5() -> dict[str, Any]:
    """Versions of HDF5 and h5py."""
    import h5py

    return {"hdf5": h5py.version.hdf5_version, "h5py": h5py.__version__}


PROBES = {"opencl": probe_opencl, "compiler": probe_compiler, "mpi": probe_mpi, "hdf5": probe_hdf5}


def ask(probe: str) -> dict[str, Any]:
    """The result of a probe run in a child process, or {"error": why there is none}."""
    code, out, err = run_child([sys.executable, "-m", "dpresnet.machine", probe], {})
    return json.loads(out.splitlines()[-1]) if code == 0 else {"error": reason(code, err)}


# ---- mpirun


def launcher_paths() -> list[str]:
    """The mpirun that a shell finds, then the one beside this python if that is another."""
    beside = Path(sys.executable).with_name("mpirun")
    found = [shutil.which("mpirun"), str(beside) if beside.exists() else None]
    return list(dict.fromkeys(path for path in found if path))


def try_launcher(path: str) -> Launcher:
    """Starts two processes with this mpirun and this python: the only sure test whether launcher and library fit."""
    _, out, err = run_child([path, "--version"], {})
    version = mpirun_version(out + err)
    code, out, err = run_child([path, "-n", "2", sys.executable, "-c", TRIAL], TRIAL_SETTINGS)
    sizes = tuple(int(size) for size in re.findall(r"<(\d+)>", out))
    return Launcher(path, version, sizes, "" if sizes else reason(code, err))


def mpirun_version(text: str) -> str:
    """Name and number in what ``mpirun --version`` prints."""
    if found := re.search(r"\(Open ?(?:MPI|RTE)\) (\S+)", text):
        return f"Open MPI {found[1]}"
    if found := re.search(r"HYDRA.*?Version:\s*(\S+)", text, re.DOTALL):
        return f"MPICH {found[1]}"
    return text.strip().split("\n")[0]


# ---- child processes


def run_child(argv: list[str], extra: Mapping[str, str], limit: float = CHILD_LIMIT_S) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr; the code is None at the time limit, when the child and its children are killed."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, text=True, env=os.environ | extra, start_new_session=True, **pipes) as child:
        try:
            out, err = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return None, *child.communicate()
    return child.returncode, out, err


def reason(code: int | None, err: str) -> str:
    """One line about a child that failed: a compiler's first error, the last thing it said, or how it ended."""
    if code is None:
        return f"no answer within {CHILD_LIMIT_S} s"
    said = [line.strip() for line in err.splitlines() if line.strip(" -=")]
    if said:
        return next((line for line in said if line.startswith("error: ")), said[-1])
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    environment.prepare(0, 0, 1)
    print(json.dumps(PROBES[sys.argv[1]]()))
