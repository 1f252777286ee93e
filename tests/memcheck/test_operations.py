"""Every test of an operation in tests/ops once more, on oclgrind; and that no kernel is left out."""

import importlib
import re
from pathlib import Path

import checked
import harness
import numpy as np
import pytest
from checked import KERNELS, Bench, compiled, launched

harness.Bench = Bench  # before the modules below take it from there

OPERATIONS = Path(harness.__file__).parent


def operation_tests(stem: str) -> dict[str, object]:
    """The test functions of tests/ops/test_<stem>.py as test_<stem>_<what>."""
    module = importlib.import_module(f"test_{stem}")
    return {f"test_{stem}_{name[5:]}": value for name, value in vars(module).items() if name.startswith("test_")}


for file in sorted(KERNELS.glob("*.cl")):
    if (OPERATIONS / f"test_{file.stem}.py").exists():
        globals().update(operation_tests(file.stem))
