"""A CPU that PoCL's compiler has no name for gets one; nothing else is ever written."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pyopencl as cl
import pytest
from harness import device_for

from dpresnet import pocl

# The name that PoCL has for this CPU is replaced by the one it has for those it does not know, which compiles nothing.
WITHOUT_NAME = """
import os, sys
import pyopencl as cl
from dpresnet import pocl
from dpresnet.device import Device, choose_device

device = choose_device()
name = device.version.rpartition("-")[2].encode() + b"\\0"
unknown, pocl.UNKNOWN = pocl.UNKNOWN, name
with open("/proc/self/mem", "r+b", buffering=0) as memory:
    address = pocl._unknown_name(memory.fileno(), device.int_ptr)
    assert address, name
    os.pwrite(memory.fileno(), unknown, address)
pocl.UNKNOWN = unknown if sys.argv[1] == "mended" else b"nothing\\0"
Device(device).program("residual", HALF=0, VEC=8)
print("built")
"""


@pytest.fixture
def real():
    device = device_for("vector").cl
    if not pocl.is_pocl(device):
        pytest.skip("this device is not driven by PoCL")
    return device


def build(cache, mode: str) -> subprocess.CompletedProcess:
    environment = {"POCL_CACHE_DIR": str(cache), "PYOPENCL_NO_CACHE": "1"}
    argv = [sys.executable, "-c", WITHOUT_NAME, mode]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)


def test_unknown_cpu_compiles(real, tmp_path):
    mended = build(tmp_path, "mended")
    assert mended.returncode == 0 and "built" in mended.stdout, mended.stderr


def test_unknown_cpu_does_not_compile_by_itself(real, tmp_path):
    """Otherwise the test above would show nothing, and the module under test could go."""
    left_alone = build(tmp_path, "left alone")
    assert left_alone.returncode != 0 and "unknown target CPU 'generic'" in left_alone.stderr


class Described:
    """A device of PoCL as it lies in memory: words, then pointers to the triple and to the name of the CPU, then words."""

    def __init__(self, triple=b"x86_64-unknown-linux-gnu", cpu=b"generic", lanes=16, fma=True, platform=None):
        self.triple, self.cpu = ctypes.create_string_buffer(triple), ctypes.create_string_buffer(cpu, 32)
        words = [0, 1, 2**64 - 1, 7, *map(ctypes.addressof, (self.triple, self.cpu)), 3] + [0] * 2000
        self._words = (ctypes.c_uint64 * len(words))(*words)
        self.int_ptr, self.native_vector_width_float = ctypes.addressof(self._words), lanes
        self.single_fp_config = cl.device_fp_config.FMA if fma else cl.device_fp_config.DENORM
        self.platform = SimpleNamespace(name=platform or "Portable Computing Language")

    @property
    def before_and_after(self) -> tuple[bytes, bytes]:
        old, words = self.cpu.value, bytes(self._words)
        pocl.name_cpu(self)
        assert bytes(self._words) == words
        return old, self.cpu.value


def test_unknown_name_is_replaced():
    assert Described().before_and_after == (b"generic", b"haswell")


def test_new_name_fits_where_the_old_one_was():
    assert len(pocl.KNOWN) <= len(pocl.UNKNOWN)


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": b"znver3"},
        {"cpu": b"generic-arm"},
        {"triple": b"aarch64-unknown-linux-gnu"},
        {"lanes": 4},
        {"fma": False},
        {"platform": "Acme"},
    ],
    ids=str,
)
def test_everything_else_is_left_alone(other):
    before, after = Described(**other).before_and_after
    assert before == after
