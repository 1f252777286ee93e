"""oclgrind interprets the kernels and reports what they do wrong; here are its options, and the folder whose tests it runs.

`oclgrind COMMAND` only puts its library in front of the OpenCL loader; the library reads the environment when the first
context is created. So the options stand here, and a test session without oclgrind is refused.
"""

import os
import sys
from pathlib import Path

import pytest

OPTIONS = {
    "UNINITIALIZED": "1",  # reported where such a value is stored, branched on or part of an address
    "DATA_RACES": "1",
    "UNIFORM_WRITES": "1",  # two work-items that write the same value to one place are a race too
    "CHECK_API": "1",
    # Nothing is moved, merged or left out, so that a message names the line. Besides, version 21.10 dies of an optimiser's
    # vector shuffles with undefined lanes when it looks for uninitialised values.
    "BUILD_OPTIONS": "-cl-opt-disable",
    "LOCAL_MEM_SIZE": str(2**20),  # that of PoCL, so that work-groups are as large; by default 32 KiB
    "GLOBAL_MEM_SIZE": str(2**31),  # buffers are kept, see checked.allocate
    "NUM_THREADS": "1",  # messages in one order; races are found from addresses, not from timing
    "MAX_ERRORS": "100000",  # of the whole process: from then on nothing is reported
}
os.environ.update({f"OCLGRIND_{name}": value for name, value in OPTIONS.items()})
os.environ["PYOPENCL_NO_CACHE"] = "1"  # its cache of binaries does not know these options
sys.path.insert(0, str(Path(__file__).parent.parent / "ops"))


def pytest_sessionstart() -> None:
    """Refuses to pass without having checked anything."""
    if "oclgrind" not in os.environ.get("LD_PRELOAD", ""):
        pytest.exit("tests/memcheck needs oclgrind around it: make test-memcheck", returncode=pytest.ExitCode.USAGE_ERROR)
