"""Every test of an operation in tests/ops once more, on oclgrind; and that no kernel is left out."""

import importlib
import re
from functools import cache
from pathlib import Path

import harness
import numpy as np
import pytest
from checked import KERNELS, Bench, compiled, launched

from dpresnet.device import Device, choose_device


class Wide(Device):
    """As CPUs with AVX-512 compute: tiles of 32 channels, which may end beyond the last block."""

    vector = 16


@cache
def device_for(path: str) -> Device:
    """The paths of `harness.device_for`, where "vector" has 8 lanes here, and "wide"."""
    return Wide(choose_device()) if path == "wide" else paths_of_the_harness(path)


# before the modules below take them from there
paths_of_the_harness, harness.device_for, harness.Bench = harness.device_for, device_for, Bench
for name in ("each_mode", "each_vector"):
    modes = [mode for mode in getattr(harness, name).args[1] if mode.path != "narrow"]  # which is "vector" here
    setattr(harness, name, pytest.mark.parametrize("mode", [*modes, harness.Mode("fp16", "wide")], ids=str))

OPERATIONS = Path(harness.__file__).parent


def operation_tests(stem: str) -> dict[str, object]:
    """The test functions of tests/ops/test_<stem>.py as test_<stem>_<what>."""
    module = importlib.import_module(f"test_{stem}")
    return {f"test_{stem}_{name[5:]}": value for name, value in vars(module).items() if name.startswith("test_")}


for file in sorted(KERNELS.glob("*.cl")):
    if (OPERATIONS / f"test_{file.stem}.py").exists():
        globals().update(operation_tests(file.stem))
several_segments = importlib.import_module("test_winograd").several_segments  # a fixture for all


@harness.each_mode
def test_probe_stream(mode):
    """As `dpresnet.bench` launches it."""
    bench = Bench(mode)
    (a, b), c = (bench.array(np.ones(48)) for _ in range(2)), bench.out_array(48)
    bench.plan.elementwise("probe", "probe_stream", 48, [a, b, c, np.float32(2)], [c])
    bench.run()
    bench.assert_exact(c, np.full(48, 3))


@harness.each_mode
def test_probe_peak(mode):
    """As `dpresnet.bench` launches it."""
    bench = Bench(mode)
    values = bench.array(np.ones(16 * 4))
    bench.plan.launch("probe", "probe_peak", (3,), [values, np.int32(2)], [values])
    bench.run()


def kernels() -> set[str]:
    """The names of all kernels in the source."""
    source = "\n".join(re.sub("//.*", "", file.read_text()) for file in KERNELS.glob("*.cl"))
    return set(re.findall(r"__kernel\b.*?\bvoid\s+(\w+)\s*\(", source, re.DOTALL))


def test_every_kernel_was_launched(request):
    """By the tests above: in one mode at least, and in every mode in which a program that was built contains it.

    One that is missing needs a test in tests/ops with a small shape; or, if a path has no use for it, an `#if VEC` around it.
    """
    if request.config.option.keyword or any("::" in argument for argument in request.config.args):
        pytest.skip("only some of the tests above were asked for")
    assert sorted(kernels() - {name for name, _ in launched}) == []
    assert sorted(f"{name} {mode}" for name, mode in compiled - launched) == []
