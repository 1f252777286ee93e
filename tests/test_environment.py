"""Thread settings: who decides, and that they reach a runtime that is loaded afterwards, or raise."""

import os
import sys
from types import ModuleType

import pytest

from dpresnet import environment
from dpresnet.environment import THREAD_VARIABLES, kernel_cache, prepare
from dpresnet.errors import Refused
from tests.launching import python


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """A process on eight cores that has not loaded pyopencl, with an empty home and no settings of its own."""
    for name in (*THREAD_VARIABLES, "POCL_CACHE_DIR", "XDG_CACHE_HOME", "POCL_AFFINITY", "PYOPENCL_NO_CACHE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what prepare writes past it
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "pyopencl", raising=False)
    monkeypatch.setattr(environment, "usable_cores", lambda: 8)
    return monkeypatch


def threads():
    return [os.environ.get(name) for name in THREAD_VARIABLES]


@pytest.mark.parametrize(
    ("asked", "local_size", "given"), [(0, 1, "8"), (0, 3, "2"), (0, 8, "1"), (0, 20, "1"), (5, 4, "5")]
)
def test_ranks_divide_the_cores(clean, asked, local_size, given):
    prepare(asked, local_size - 1, local_size)
    assert threads() == [given] * 3
    assert os.environ["PYOPENCL_NO_CACHE"] == "1"
    assert "POCL_AFFINITY" not in os.environ


def test_the_environment_goes_before_the_default_and_the_flag_before_both(clean):
    clean.setenv(THREAD_VARIABLES[0], "3")
    clean.setenv("PYOPENCL_NO_CACHE", "0")
    prepare(0, 0, 4)
    assert threads() == ["3", "2", "2"]
    assert os.environ["PYOPENCL_NO_CACHE"] == "0"
    prepare(6, 0, 4)
    assert threads() == ["6"] * 3


@pytest.mark.parametrize(("asked", "local_size"), [(2, 4), (0, 4), (8, 1), (0, 1)])
def test_after_pyopencl_only_what_is_in_force_may_be_asked(clean, asked, local_size):
    clean.setitem(sys.modules, "pyopencl", ModuleType("pyopencl"))
    if (asked or 8 // local_size) == 8:  # what a runtime without settings uses
        prepare(asked, 0, local_size)
    else:
        with pytest.raises(RuntimeError, match="already loaded with 8 threads, 2 are asked"):
            prepare(asked, 0, local_size)


def test_asking_twice_for_the_same_is_fine(clean):
    prepare(2, 0, 4)
    clean.setitem(sys.modules, "pyopencl", ModuleType("pyopencl"))
    prepare(2, 0, 4)
    prepare(0, 0, 4)
    with pytest.raises(RuntimeError, match="with 2 threads, 1 are asked"):
        prepare(1, 0, 4)


@pytest.mark.parametrize("arguments", [(-1, 0, 1), (0, 1, 1), (0, -1, 2)])
def test_impossible_arguments(clean, arguments):
    with pytest.raises(ValueError, match="impossible"):
        prepare(*arguments)


def test_the_kernel_cache_is_the_usual_one_for_all_ranks(clean, tmp_path):
    folders = []
    for rank in range(2):
        clean.delenv("POCL_CACHE_DIR", raising=False)
        prepare(0, rank, 2)
        folders.append(os.environ["POCL_CACHE_DIR"])
    assert folders == [str(tmp_path / ".cache" / "pocl" / "kcache")] * 2
    clean.delenv("POCL_CACHE_DIR")
    clean.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kernel_cache() == tmp_path / "xdg" / "pocl" / "kcache"
    clean.setenv("POCL_CACHE_DIR", str(tmp_path / "chosen"))
    assert kernel_cache() == tmp_path / "chosen"


@pytest.mark.parametrize("home", ["a file", ""])
def test_without_a_home_the_kernel_cache_is_private(clean, tmp_path, home):
    (tmp_path / "a file").touch()
    clean.setenv("HOME", home and str(tmp_path / home))
    clean.setattr(environment.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = kernel_cache()
    assert folder == tmp_path / f"dpresnet-pocl-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(Refused, match=r"open to other users.*POCL_CACHE_DIR"):
        kernel_cache()


def test_intel_runtime_is_looked_for_in_the_environment_of_this_python(clean, tmp_path):
    clean.setattr(sys, "prefix", str(tmp_path))
    assert environment.intel_vendors() is None
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libintelocl.so").touch()
    assert environment.intel_vendors() == tmp_path / "lib" / "libintelocl.so"


@pytest.mark.parametrize("threads_asked", [1, 2])
def test_pocl_obeys(threads_asked, tmp_path):
    """In a process of its own, because a runtime reads the settings once."""
    code = f"""if True:
        from dpresnet.environment import prepare
        prepare({threads_asked}, 0, 1)
        import pyopencl
        (pocl,) = [p for p in pyopencl.get_platforms() if p.name == "Portable Computing Language"]
        print(pocl.get_devices()[0].max_compute_units)
        """
    done = python(["-c", code], env={"POCL_CACHE_DIR": str(tmp_path)})
    assert done.stdout == f"{threads_asked}\n", done.stderr


def test_a_kernel_cache_that_cannot_be_written_is_refused_by_name(clean):
    for folder in ("/proc/nowhere", __file__):
        clean.setenv("POCL_CACHE_DIR", folder)
        with pytest.raises(Refused, match=f"POCL_CACHE_DIR={folder} cannot be written"):
            environment.kernel_cache()


@pytest.mark.parametrize(
    ("everyone", "rank", "threads", "kept"),
    [
        ([("a", range(4)), ("a", range(4))], 0, 0, {0, 1}),
        ([("a", range(4)), ("a", range(4))], 1, 2, {2, 3}),
        ([("a", range(5)), ("a", range(5))], 1, 0, {2, 3}),  # a core is left over
        ([("a", range(4)), ("b", range(4)), ("a", range(4))], 2, 0, {2, 3}),  # another host has its own
        ([("a", range(4)), ("a", range(4))], 1, 3, None),  # more threads than cores in a share
        ([("a", range(1)), ("a", range(1))], 1, 0, None),  # fewer cores than ranks
        ([("a", range(4))], 0, 0, None),
        ([("a", range(0, 2)), ("a", range(2, 4))], 1, 0, None),  # bound by the launcher
        ([("a", range(0, 3)), ("a", range(2, 4))], 1, 0, None),
        ([("a", ()), ("a", ())], 0, 0, None),  # a system that does not tell
    ],
)
def test_ranks_of_a_host_keep_to_their_share_of_the_cores(monkeypatch, everyone, rank, threads, kept):
    found = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: found.append(set(cores)))
    monkeypatch.setattr(environment, "place_of", lambda core: core)
    environment.bind([(host, frozenset(cores)) for host, cores in everyone], rank, threads)
    assert found == ([kept] if kept else [])


def test_a_share_consists_of_neighbours(monkeypatch):
    """Two processors of two physical cores with two threads each, as Linux numbers them."""
    found = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: found.append(set(cores)))
    monkeypatch.setattr(environment, "place_of", lambda core: (core % 4 // 2, core % 2, core))
    for rank in range(4):
        environment.bind([("a", frozenset(range(8)))] * 4, rank)
    assert found == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]


def test_the_place_of_a_core_is_known_here():
    assert all(environment.place_of(core)[2] == core for core in environment.own_cores())
