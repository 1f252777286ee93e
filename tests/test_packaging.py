"""The wheel holds everything and works away from the checkout; launch/local.sh starts the right mpirun, rightly."""

import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns, which

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCAL = ROOT / "launch" / "local.sh"
SOURCES = {
    "dpresnet": "dpresnet",
    "kernels": "dpresnet/kernels",
    "launch": "dpresnet/launch",
    "datasets": "dpresnet/datasets",
}


def run(*argv, **options):
    return subprocess.run(argv, capture_output=True, text=True, check=True, **options).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy, because setuptools leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copytree(ROOT / name, folder / "source" / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    run(sys.executable, "-m", "pip", "wheel", *options, str(folder / "source"))
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder for PYTHONPATH that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--quiet", "--no-compile", "--target", str(target)]
    run(sys.executable, "-m", "pip", "install", *options, str(wheel))
    return target


def test_the_wheel_holds_every_file_of_the_source(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{file.relative_to(ROOT / folder)}"
        for folder, package in SOURCES.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert packed == expected
    assert {"dpresnet/kernels/conv.cl", "dpresnet/datasets/digits.h5", "dpresnet/launch/local.sh",
            "dpresnet/recipes/digits-resnet20.toml", "dpresnet/templates/report.html"} <= packed


def test_nothing_but_dpresnet_lands_at_the_top(installed):
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"dpresnet"}


def test_the_wheel_works_away_from_the_checkout(installed, tmp_path):
    """Kernels, data and launcher come from the wheel, the commands start, and the version is that of the package."""
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    code = """if True:
        import dpresnet.kernels, dpresnet.launch, dpresnet.data
        from importlib.metadata import version
        from importlib.resources import files
        print(dpresnet.__file__, dpresnet.data.DIGITS, *[files(f"dpresnet.{part}") for part in ("kernels", "launch")])
        digits = dpresnet.data.load("digits")
        print(version("dpresnet") == dpresnet.__version__, len(digits.train.labels) + len(digits.test.labels))
        """
    paths, facts = run(sys.executable, "-c", code, env=environ, cwd=tmp_path).splitlines()
    assert [str(installed) in path for path in paths.split()] == [True] * 4
    assert facts == "True 1797"
    for program in ("train", "doctor", "bench"):
        assert "usage" in run(sys.executable, "-m", f"dpresnet.{program}", "--help", env=environ, cwd=tmp_path).lower()


def test_the_wheel_trains_away_from_the_checkout(installed, tmp_path):
    """Kernels, launchers and the embedded data set come from the wheel alone."""
    script = f"import dpresnet; assert dpresnet.__path__ == [{str(installed / 'dpresnet')!r}], dpresnet.__path__\n"
    script += "from dpresnet import train; train.main()"
    command = (sys.executable, "-c", script, "--replicas", "2", "--steps", "2", "--out", str(tmp_path / "run"))
    run(*command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, timeout=100)
    assert '"steps": 2,' in (tmp_path / "run" / "result.json").read_text()


def test_the_installed_launcher_is_found_and_runs(installed, tmp_path):
    script = installed / "dpresnet" / "launch" / "local.sh"
    assert "dpresnet.train" in run("bash", str(script), "-n", "1", env=fakes(tmp_path, "mpich", cores=4))


# ---- launch/local.sh, with a python, an mpirun, nproc and id that only say what this machine shall seem to be

LIBRARIES = {
    "mpich": "MPICH Version:      5.0.2",
    "intel": "Intel(R) MPI Library 2021.17 for Linux* OS",
    "openmpi4": "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4",
    "openmpi5": "Open MPI v5.0.11, package: Open MPI user@localhost Distribution",
}
LAUNCHERS = {
    "mpich": "HYDRA build details:\n    Version:    5.0.2",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.17",
    "openmpi4": "mpirun (Open MPI) 4.1.4",
    "openmpi5": "mpirun (Open MPI) 5.0.11",
}


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def fakes(tmp_path, library, cores, user=1000, launchers=(), beside=None):
    """Environment of a machine. ``launchers``: the mpiruns on PATH in this order; ``beside``: the one beside python."""
    script(tmp_path / "env" / "python", f"test $2 = mpi4py && echo '{LIBRARIES.get(library, library)}'")
    script(tmp_path / "tools" / "nproc", f"echo {cores}")
    script(tmp_path / "tools" / "id", f"echo {user}")
    if beside:
        script(tmp_path / "env" / "mpirun", f"echo '{LAUNCHERS[beside]}'")
    folders = []
    for kind in launchers or [library]:
        script(tmp_path / kind / "mpirun", f"echo '{LAUNCHERS[kind]}'")
        folders.append(str(tmp_path / kind))
    path = os.pathsep.join([*folders, str(tmp_path / "tools"), os.path.dirname(which("bash")), "/usr/bin", "/bin"])
    return {"PATH": path, "PYTHON": str(tmp_path / "env" / "python"), "DPRESNET_DRY": "1"}


def dry(environ, *arguments):
    return subprocess.run(["bash", str(LOCAL), *arguments], env=environ, capture_output=True, text=True)


def command(tmp_path, kind, options, threads=1):
    names = ("POCL_MAX_PTHREAD_COUNT", "POCL_CPU_MAX_CU_COUNT", "DPCPP_CPU_NUM_CUS")
    start = ["env", *(f"{name}={threads}" for name in names), f"{tmp_path}/{kind}/mpirun"]
    return [*start, *options, f"{tmp_path}/env/python", "-m", "dpresnet.train", "--out", "a b"]


GOLDEN = [
    ("mpich", 4, ["-n", "4"]),
    ("mpich", 2, ["-n", "4"]),
    ("intel", 2, ["-n", "4"]),
    ("openmpi4", 4, ["-n", "4", "--bind-to", "none"]),
    ("openmpi4", 2, ["-n", "4", "--bind-to", "none", "--oversubscribe"]),
    ("openmpi5", 4, ["-n", "4", "--bind-to", "none"]),
    ("openmpi5", 2, ["-n", "4", "--bind-to", "none", "--map-by", ":oversubscribe"]),
]


@pytest.mark.parametrize(("kind", "cores", "options"), GOLDEN)
@pytest.mark.parametrize("user", [0, 1000])
def test_command(tmp_path, kind, cores, options, user):
    """Ranks may outnumber cores, and root may start Open MPI, only where that is the case."""
    done = dry(fakes(tmp_path, kind, cores, user), "-n", "4", "--", "--out", "a b")
    root = ["--allow-run-as-root"] if user == 0 and kind.startswith("openmpi") else []
    assert shlex.split(done.stdout) == command(tmp_path, kind, options + root), done.stderr


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_the_mpirun_of_the_library_is_chosen_not_the_first(tmp_path, kind):
    """MPICH and Intel MPI start each other's programs, so there the first of the two is right."""
    order = ["openmpi4", "mpich", "openmpi5", "intel"] if kind != "intel" else ["openmpi5", "intel", "mpich"]
    done = dry(fakes(tmp_path, kind, 4, launchers=order), "-n", "1")
    assert f"{tmp_path}/{kind}/mpirun" in shlex.split(done.stdout)


@pytest.mark.parametrize(("beside", "chosen"), [("openmpi5", "env"), ("mpich", "openmpi5")])
def test_the_mpirun_beside_python_goes_first_if_it_fits(tmp_path, beside, chosen):
    done = dry(fakes(tmp_path, "openmpi5", 4, beside=beside), "-n", "2")
    assert f"{tmp_path}/{chosen}/mpirun" in shlex.split(done.stdout)


@pytest.mark.parametrize(("arguments", "cores", "ranks", "threads"), [((), 6, 6, 1), (("-n", "2"), 9, 2, 4)])
def test_ranks_and_threads_share_the_cores(tmp_path, arguments, cores, ranks, threads):
    words = shlex.split(dry(fakes(tmp_path, "mpich", cores), *arguments).stdout)
    assert words[words.index("-n") + 1] == str(ranks)
    assert f"POCL_MAX_PTHREAD_COUNT={threads}" in words


def test_the_users_thread_setting_stands(tmp_path):
    environ = fakes(tmp_path, "mpich", 4) | {"POCL_MAX_PTHREAD_COUNT": "3", "OMP_NUM_THREADS": "1"}
    words = shlex.split(dry(environ, "-n", "2").stdout)
    assert {"POCL_MAX_PTHREAD_COUNT=3", "DPCPP_CPU_NUM_CUS=2"} <= set(words)


@pytest.mark.parametrize(
    ("library", "launchers", "arguments", "said"),
    [
        ("openmpi5", ["openmpi4", "mpich"], ["-n", "2"], "no mpirun of mpi4py's MPI library (openmpi5)"),
        ("Spectrum", ["mpich"], ["-n", "2"], "none of MPICH"),
        ("mpich", ["mpich"], ["-n"], "-n '' is not a number of ranks"),
        ("mpich", ["mpich"], ["-n", "0"], "-n '0' is not a number of ranks"),
        ("mpich", ["mpich"], ["--epochs", "3"], "unknown argument --epochs"),
    ],
)
def test_refusals(tmp_path, library, launchers, arguments, said):
    done = dry(fakes(tmp_path, library, 4, launchers=launchers), *arguments)
    assert (done.returncode, done.stdout) == (78, "")
    assert said in done.stderr


def test_without_mpi4py_its_error_is_shown(tmp_path):
    environ = fakes(tmp_path, "mpich", 4)
    script(tmp_path / "env" / "python", "echo 'No module named mpi4py' >&2; exit 1")
    done = dry(environ, "-n", "2")
    assert (done.returncode, done.stderr) == (78, "local.sh: mpi4py finds no MPI library: No module named mpi4py\n")


def test_the_exit_code_and_the_settings_pass_through(tmp_path):
    environ = fakes(tmp_path, "mpich", 4)
    reply = f"test $1 = --version && echo '{LAUNCHERS['mpich']}' && exit; echo \"$POCL_MAX_PTHREAD_COUNT $*\"; exit 75"
    script(tmp_path / "mpich" / "mpirun", reply)
    done = dry(environ | {"DPRESNET_DRY": ""}, "-n", "2", "--", "--resume", "auto")
    assert done.returncode == 75
    assert done.stdout == f"2 -n 2 {tmp_path}/env/python -m dpresnet.train --resume auto\n"


def test_a_signal_to_the_script_reaches_mpirun(tmp_path):
    """Which takes the place of the script's process."""
    environ = fakes(tmp_path, "mpich", 4) | {"DPRESNET_DRY": ""}
    script(tmp_path / "mpich" / "mpirun", f"test $1 = --version && echo '{LAUNCHERS['mpich']}' || echo $$")
    with subprocess.Popen(["bash", str(LOCAL)], env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.read() == f"{process.pid}\n"


@pytest.mark.parametrize("file", [*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"], ids=lambda file: file.name)
def test_shell_files_are_executable_and_parse(file):
    assert os.access(file, os.X_OK)
    run("bash", "-n", str(file))
