"""connect() and the collectives, in real jobs; the launchers' environments, in plain dictionaries."""

from pathlib import Path

import numpy as np
import pytest

from dpresnet import comm
from dpresnet.comm import Solo, levels
from dpresnet.launcher import Launch, launched
from tests.launching import mpirun, python

WORKER = str(Path(__file__).with_name("worker_comm.py"))
CONNECT = (
    "import sys; from dpresnet.comm import connect; c = connect(); print(type(c).__name__, c.size, 'mpi4py' in sys.modules)"
)
LOCAL_RANKS = """
from dpresnet.comm import connect
c = connect()
found = c.gather(f"{c.local_rank}/{c.local_size}")
if c.rank == 0:
    print(c.mpi_library, ",".join(found))
"""
HYDRA_OF_ANOTHER_MPI = {"PMI_SIZE": "4", "PMI_RANK": "2"}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_collectives(ranks):
    job = mpirun(ranks, [WORKER, ranks])
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("all as expected") == 1


def test_local_ranks_of_two_nodes():
    """MPICH can pretend that the ranks of one machine sit on two nodes; another MPI ignores the variable."""
    job = mpirun(4, ["-c", LOCAL_RANKS], env={"MPIR_CVAR_NUM_CLIQUES": "2"})
    library, found = job.stdout.rsplit(maxsplit=1)
    assert found == ("0/2,0/2,1/2,1/2" if "MPICH" in library else "0/4,1/4,2/4,3/4")


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([0], []),
        ([0, 0, 0], [[[0, 1, 2]]]),  # one node
        ([0, 1, 2], [[[0, 1, 2]]]),  # a rank on each
        ([0, 0, 2, 2, 2], [[[0, 1, 2, 3, 4]]]),  # unequal ones
        ([0, 0, 2, 2], [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]),
        ([0, 1, 0, 1], [[[0, 2], [1, 3]], [[0, 1], [2, 3]]]),
        ([0, 1, 1, 0], [[[0, 3], [1, 2]], [[0, 1], [2, 3]]]),
        ([0, 0, 2, 2, 4, 4], [[[0, 1], [2, 3], [4, 5]], [[0, 2, 4], [1, 3, 5]]]),
    ],
)
def test_levels(nodes, expected):
    """Ranks in their order in each group, as in its communicator."""
    assert levels(nodes) == expected


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, None),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, Launch("a Hydra mpirun (MPICH, Intel MPI)", 4, 3)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}, ("Open MPI", 2, 1)),
        # mpirun inside a Slurm job: the daemons are a step of one task per node, the ranks inherit its variables
        ({"PMI_SIZE": "8", "PMI_RANK": "5", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ("Hydra", 8, 5)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "PMIX_RANK": "1"}, Launch("srun", 4, 1)),
        # a batch script of four tasks, not a task itself
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        ({"PMIX_RANK": "3"}, Launch("a PMIx launcher", 0, 3)),
    ],
)
def test_launchers(environ, launch):
    found = launched(environ)
    if isinstance(launch, tuple):
        assert launch[0] in found.name and (found.size, found.rank) == launch[1:]
    else:
        assert found == launch


def test_one_process_needs_no_mpi():
    assert python(["-c", CONNECT]).stdout.split() == ["Solo", "1", "False"]


def test_one_rank_needs_no_mpi():
    assert mpirun(1, ["-c", CONNECT]).stdout.split() == ["Solo", "1", "False"]


def test_mpi_that_is_already_there_is_used():
    run = python(["-c", "from mpi4py import MPI;" + CONNECT])
    assert run.stdout.split() == ["World", "1", "True"]
    assert run.returncode == 0


def test_debug_never_imports_mpi():
    """Not even where a launcher is at work that does not tell how many processes it started."""
    run = python(["-c", CONNECT.replace("connect()", "connect(debug=True)")], env={"PMIX_RANK": "0"})
    assert run.stdout.split() == ["Solo", "1", "False"]


def test_debug_with_several_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(comm.Refused, match=r"--debug runs in a single process, but a Hydra mpirun .* started 2"):
        comm.connect(debug=True)


def test_mpirun_of_another_mpi_is_refused():
    """The launcher says four, MPI finds itself alone: each of the four would train on its own."""
    run = python(["-c", CONNECT], env=HYDRA_OF_ANOTHER_MPI)
    assert "Refused: a Hydra mpirun (MPICH, Intel MPI) started 4 processes, but mpi4py loaded" in run.stderr
    assert "MPI4PY_LIBMPI" in run.stderr


def test_missing_mpi_library_is_refused():
    run = python(["-c", CONNECT], env={**HYDRA_OF_ANOTHER_MPI, "MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert "but MPI cannot be loaded (" in run.stderr
    assert "install mpi4py and the MPI that this launcher belongs to" in run.stderr


def test_solo_is_the_identity():
    solo, a = Solo(), np.arange(6, dtype=np.float32).reshape(2, 3)
    assert solo.allgather(a).shape == (1, 2, 3)
    assert (solo.agree([1, 0]) == [1, 0]).all()
    assert solo.bcast("x") == "x" and solo.gather("x") == ["x"]
    assert len(solo.groups) == 0


def test_waiting_ranks_leave_the_cores_to_others():
    """A rank that waits half a second for another uses a small part of a core, though it polls."""
    code = (
        "import time; from dpresnet.comm import connect; c = connect(); c.barrier(); begin = time.process_time()\n"
        "time.sleep(0.5 if c.rank == 1 else 0); c.barrier()\n"
        "if c.rank == 0: print(time.process_time() - begin)"
    )
    assert float(mpirun(2, ["-c", code]).stdout) < 0.2


LARGE = """
import numpy as np
from dpresnet import comm
world, spins, found = comm.connect(), [], []
wait = world.wait_until
world.wait_until = lambda done, spin=comm.SPIN_S: (spins.append(spin), wait(done, spin))
(group,) = world.groups
def send(nbytes):
    data = np.zeros(2 * nbytes, np.uint8)
    return group.start_alltoall(data, [nbytes] * 2, np.empty_like(data), [nbytes] * 2)
for nbytes, shared in ((8, False), (2**16, False), (2**16, True)):
    common = world.share(4096) if shared else None
    request = group.start_shared("alltoall", common, 0, nbytes, "parts") if shared else send(nbytes)
    del spins[:]
    world.barrier()
    request.wait()
    world.barrier()
    found.append(spins[:])
found = world.gather(found)
if world.rank == 0:
    print(found)
"""


def test_only_messages_that_mpi_moves_are_polled_for_without_naps():
    """Ranks that wait for anything else leave their core to others."""
    job = mpirun(2, ["-c", LARGE])
    assert job.returncode == 0, job.stderr
    short, long = [comm.SPIN_S] * 3, [comm.BULK_SPIN_S] * 2 + [comm.SPIN_S]
    assert job.stdout.strip() == str([[short, long, short]] * 2)
