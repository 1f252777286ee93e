"""Every fault is recognised from its facts alone, a healthy machine has none, and the real commands say so."""

import os
import shutil
import sys
from dataclasses import replace

import pytest

from dpresnet import doctor, machine
from dpresnet.machine import Facts, Launcher

DEVICE = {"name": "Zen", "platform": "PoCL", "driver": "3.0", "kind": "CPU", "units": 8, "lanes": 16}
FITTING = Launcher("/env/bin/mpirun", "MPICH 5.0.2", sizes=(2, 2))
FOREIGN = Launcher("/usr/bin/mpirun", "Open MPI 4.1.4", sizes=(1, 1))
CRASHING = Launcher("/usr/bin/mpirun", "Open MPI 4.1.4", error="MPIR_pmi_init failed")

HEALTHY = Facts(
    ranks=4,
    cores=8,
    root=False,
    settings={},
    drivers={"/etc/OpenCL/vendors/pocl.icd": True},
    opencl={"platforms": ["PoCL (OpenCL 3.0)"], "devices": [DEVICE], "pyopencl": "2026.1"},
    compiler={"device": "Zen", "lanes": 8},
    mpi={"library": "MPICH 5.0.2", "mpi4py": "4.1.2"},
    hdf5={"hdf5": "2.0.0", "h5py": "3.16.0"},
    launchers=(FITTING,),
    cache="/home/me/.cache/pocl",
    cache_error="",
)
NO_PLATFORM = {"platforms": [], "devices": [], "pyopencl": "2026.1"}

# name of the diagnosis: what differs from HEALTHY, a part of the fault, a part of the remedy, fatal
FAULTS = [
    ("opencl_not_loaded", {"opencl": {"error": "No module named 'pyopencl'"}}, "pyopencl", "pip install", True),
    ("opencl_not_loaded", {"opencl": {"error": "libOpenCL.so.1: cannot open"}}, "libOpenCL", "ocl-icd", True),
    ("opencl_not_loaded", {"opencl": {"error": "ended by SIGSEGV"}}, "SIGSEGV", "get_platforms", True),
    ("no_platform", {"opencl": NO_PLATFORM}, "no driver is installed", "dpresnet[local]", True),
    ("no_platform", {"opencl": NO_PLATFORM, "settings": {"OCL_ICD_VENDORS": "/x"}}, "=/x names no", "unset", True),
    ("dangling_driver", {"drivers": {"/a.icd": True, "/b.icd": False}}, "/b.icd", "reinstall", False),
    ("no_device", {"opencl": NO_PLATFORM | {"platforms": ["CUDA"]}}, "CUDA reports none", "/dev/nvidia", True),
    ("compiler_fails", {"compiler": {"error": "LLVM ERROR"}}, "Zen (PoCL): LLVM ERROR", "--device", True),
    ("cache_refused", {"cache_error": "/tmp/x is open: remove it"}, "/tmp/x is open", "remove it", True),
    ("mpi_not_loaded", {"mpi": {"error": "no libmpi"}}, "no libmpi", "MPI4PY_LIBMPI", True),
    ("mpi_not_loaded", {"mpi": {"error": "no libmpi"}, "ranks": 1}, "no libmpi", "one process needs none", False),
    ("no_mpirun", {"launchers": ()}, "no mpirun", "mpirun of MPICH 5.0.2", True),
    ("no_mpirun", {"launchers": (), "ranks": 1}, "no mpirun", "activate", False),
    ("foreign_mpirun", {"launchers": (FOREIGN,)}, "two processes sees 1", "MPI4PY_LIBMPI", True),
    ("foreign_mpirun", {"launchers": (FOREIGN, FITTING)}, "/usr/bin/mpirun (Open", "use /env/bin/mpirun", False),
    ("foreign_mpirun", {"launchers": (CRASHING,)}, "MPIR_pmi_init failed", "mpirun of MPICH 5.0.2", True),
    ("more_ranks_than_cores", {"cores": 2}, "4 ranks share 2 cores", "same result", False),
    (
        "too_many_threads",
        {"settings": {"POCL_MAX_PTHREAD_COUNT": "8"}},
        "4 ranks of 8 threads on 8",
        "unset POCL",
        False,
    ),
    ("too_many_threads", {"settings": {"DPCPP_CPU_NUM_CUS": "3"}}, "4 ranks of 3 threads on 8", "unset DPCPP", False),
    ("pinned_threads", {"settings": {"POCL_AFFINITY": "1"}}, "same cores", "unset POCL_AFFINITY", False),
    ("hdf5_not_loaded", {"hdf5": {"error": "no h5py"}}, "no h5py", "pip install h5py", True),
]


@pytest.mark.parametrize(("name", "changes", "fault", "remedy", "fatal"), FAULTS)
def test_each_fault_is_found_alone_with_its_remedy(name, changes, fault, remedy, fatal):
    facts = replace(HEALTHY, **changes)
    assert [diagnosis.__name__ for diagnosis in doctor.DIAGNOSES if diagnosis(facts)] == [name]
    (found,) = doctor.diagnose(facts)
    assert fault in found.fault
    assert remedy in found.remedy
    assert found.fatal == fatal


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"root": True},
        {"cores": 4},
        {"settings": {"POCL_MAX_PTHREAD_COUNT": "2", "DPCPP_CPU_NUM_CUS": "1", "POCL_AFFINITY": "0"}},
        {"settings": {"POCL_AFFINITY": "1"}, "ranks": 1},
    ],
)
def test_a_healthy_machine_has_no_fault(changes):
    assert doctor.diagnose(replace(HEALTHY, **changes)) == []


def test_open_mpi_wants_permission_for_root_and_for_more_ranks_than_cores():
    facts = replace(HEALTHY, root=True, cores=2, launchers=(replace(FITTING, version="Open MPI 5.0.11"),))
    root, crowd = doctor.diagnose(facts)
    assert "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1" in root.remedy
    assert ":oversubscribe" in crowd.remedy
    allowed = replace(facts, settings={"OMPI_ALLOW_RUN_AS_ROOT": "1"})
    assert doctor.diagnose(allowed) == [crowd]


def test_every_diagnosis_has_a_case():
    assert {name for name, *_ in FAULTS} | {"root_refused"} == {diagnosis.__name__ for diagnosis in doctor.DIAGNOSES}


def test_what_prevents_training_comes_first_and_decides_the_exit_code(monkeypatch, capsys):
    facts = replace(HEALTHY, cores=2, hdf5={"error": "no h5py"})
    monkeypatch.setattr(doctor, "gather", lambda ranks: replace(facts, ranks=ranks))
    assert doctor.main(["-n", "3"]) == 78
    out = capsys.readouterr().out
    assert out.index("FAULT: HDF5") < out.index("note: 3 ranks share 2 cores") < out.index("cannot run here")
    facts = HEALTHY
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.endswith("training with 4 ranks can run here\n")


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("HYDRA build details:\n    Version:         5.0.2\n    CC: cc\n", "MPICH 5.0.2"),
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to\n", "Open MPI 5.0.11"),
        ("mpirun.real (OpenRTE) 4.1.4\n", "Open MPI 4.1.4"),
        (
            "Intel(R) MPI Library for Linux* OS, Version 2021.17\n(C)\n",
            "Intel(R) MPI Library for Linux* OS, Version 2021.17",
        ),
    ],
)
def test_mpirun_versions(printed, version):
    assert machine.mpirun_version(printed) == version


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_launcher_is_tried_with_two_processes(tmp_path):
    alone = 'test "$1" = --version || { echo "<1>"; echo "<1>"; }'
    assert machine.try_launcher(script(tmp_path / "alone", alone)).sizes == (1, 1)
    broken = machine.try_launcher(script(tmp_path / "broken", "echo the reason >&2; echo ------ >&2; exit 3"))
    assert (broken.sizes, broken.error, broken.fits) == ((), "the reason", False)


def test_children_that_hang_or_crash_become_one_line(tmp_path):
    hanging = script(tmp_path / "hanging", "sleep 60 & sleep 60")
    code, _, err = machine.run_child([hanging], {}, limit=0.5)
    assert machine.reason(code, err) == "no answer within 60 s"
    code, _, err = machine.run_child([script(tmp_path / "crashing", "kill -11 $$")], {})
    assert machine.reason(code, err) == "ended by SIGSEGV"
    code, _, err = machine.run_child([script(tmp_path / "failing", "exit 3")], {})
    assert machine.reason(code, err) == "exit code 3"


def test_the_reason_of_a_failed_build_is_what_the_compiler_says():
    log = "Traceback:\nBuild on X:\nerror: unknown CPU\nfailed to build\n(options: -D)"
    assert machine.reason(1, log) == "error: unknown CPU"


@pytest.mark.parametrize(
    ("wrong", "said"), [("STORE(LOAD(a + i), y + i);", "wrong result of a kernel"), ("undeclared;", "undeclared")]
)
def test_a_device_that_builds_or_computes_wrongly_is_found(wrong, said, monkeypatch):
    """The compiler's probe really builds a kernel, and looks at what it computes."""
    from dpresnet import device

    source = device.kernel_source
    right = "STORE(LOAD(a + i) + LOAD(b + i), y + i);"
    assert right in source("residual")
    monkeypatch.setattr(device, "kernel_source", lambda stem: source(stem).replace(right, wrong))
    with pytest.raises((RuntimeError, device.BuildError), match=said):
        machine.probe_compiler()


def test_registered_drivers(tmp_path, monkeypatch):
    (tmp_path / "good.icd").write_text(f"{tmp_path}/good.icd\n")
    (tmp_path / "gone.icd").write_text("/not/there/libfoo.so\n")
    (tmp_path / "bare.icd").write_text("libfoo.so.1\n")
    for place, expected in {
        ".": {"bare.icd": True, "gone.icd": False, "good.icd": True},
        "gone.icd": {"gone.icd": False},
        "libbar.so": {"libbar.so": False},
    }.items():
        monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path / place))
        assert machine.registered_drivers() == {str(tmp_path / name): there for name, there in expected.items()}


def doctor_here(tmp_path, **environ):
    """Exit code, stdout and stderr of the real doctor."""
    argv = [sys.executable, "-m", "dpresnet.doctor", "-n", "2"]
    return machine.run_child(argv, {"POCL_CACHE_DIR": str(tmp_path), **environ})


def test_this_machine_can_train(tmp_path):
    code, out, err = doctor_here(tmp_path)
    assert code == 0, out + err
    for text in ("device 0: ", "-wide kernels for", "belongs to it", "HDF5", f"POCL_CACHE_DIR={tmp_path}"):
        assert text in out


def test_no_driver_is_said_and_ends_with_78(tmp_path):
    code, out, _ = doctor_here(tmp_path, OCL_ICD_VENDORS=str(tmp_path / "nothing"))
    assert code == 78
    assert f"FAULT: no OpenCL platform: OCL_ICD_VENDORS={tmp_path}/nothing names no driver that loads" in out
    assert "remedy: unset or correct OCL_ICD_VENDORS" in out


def test_an_mpirun_that_starts_strangers_is_said_with_the_one_to_use(tmp_path):
    own = shutil.which("mpirun", path=os.path.dirname(sys.executable)) or shutil.which("mpirun")
    script(tmp_path / "mpirun", f'"{own}" -n 1 "$3" "$4" "$5"; "{own}" -n 1 "$3" "$4" "$5"')
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    code, out, _ = doctor_here(tmp_path, PATH=path, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    assert f"{tmp_path}/mpirun" in out
    assert "each of two processes sees 1" in out
    if os.path.dirname(own) == os.path.dirname(sys.executable):
        assert f"remedy: use {own}" in out
        assert code == 0
