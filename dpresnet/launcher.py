"""Who started this process, and the MPI library that belongs to that launcher."""

import atexit
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpresnet.errors import Refused


@dataclass(frozen=True)
class Launch:
    """What the launcher says in the environment; ``size`` is 0 where it does not tell."""

    name: str
    size: int
    rank: int


# Order matters: mpirun inside a Slurm job starts its own daemons with srun, so a rank sees the variables of both.
_LAUNCHERS = (
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("a Hydra mpirun (MPICH, Intel MPI)", "PMI_SIZE", "PMI_RANK"),
    ("MVAPICH's mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("a PMIx launcher", "", "PMIX_RANK"),
    ("PALS mpiexec", "", "PALS_RANKID"),
)


def launched(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The launcher that started this process, or None."""
    for name, size, rank in _LAUNCHERS:
        if (size or rank) in environ:
            return Launch(name, int(environ.get(size, 0)), int(environ.get(rank, 0)))
    return None


def join(launch: Launch) -> Any:
    """mpi4py's MPI module, initialised; Refused if it cannot be what ``launch`` started."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(
            f"{launch.name} started {launch.size or 'several'} processes, but MPI cannot be loaded ({reason}): "
            "install mpi4py and the MPI that this launcher belongs to"
        ) from error
    # MPI_Init of an MPICH library ends the process with an internal error when it finds Open MPI's launcher.
    if launch.name.startswith("Open MPI") and "MPICH" in MPI.Get_library_version():
        raise _strangers(launch, MPI)
    if not MPI.Is_initialized():
        with warnings.catch_warnings(action="ignore"):  # mpi4py's hint at what _strangers says with a remedy
            MPI.Init_thread(MPI.THREAD_SERIALIZED)
        atexit.register(MPI.Finalize)
    if MPI.COMM_WORLD.size == 1 < launch.size:
        raise _strangers(launch, MPI)
    return MPI


def library(mpi: Any) -> str:
    """Name and version of the MPI library, such as ``MPICH 5.0.2`` or ``Open MPI v5.0.11``."""
    first = mpi.Get_library_version().splitlines()[0]
    return " ".join(first.split(",")[0].replace("Version:", "").split())


def _strangers(launch: Launch, mpi: Any) -> Refused:
    return Refused(
        f"{launch.name} started {launch.size} processes, but mpi4py loaded {library(mpi)}, which that launcher does "
        "not belong to, so each process is alone: start with the mpirun of that library "
        "(`python -m mpi4py --mpi-lib-version` shows it), or choose the library with MPI4PY_LIBMPI=/path/to/libmpi.so"
    )
