"""The program on a second, independent OpenCL implementation.

Run with OCL_ICD_VENDORS naming Intel's library; `make test-intel` also runs tests/ops there.
"""

import json

import pytest

from dpresnet.device import Device, choose_device
from tests.launching import mpirun, python


def result(out, done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads((out / "result.json").read_text())


def test_this_is_intels_runtime():
    assert "Intel" in Device(choose_device()).cl.platform.name


@pytest.mark.limit(400)
def test_digits(tmp_path):
    out = tmp_path / "digits"
    done = python(["-m", "dpresnet.train", "--replicas", "4", "--out", str(out)], timeout=380)
    assert result(out, done)["test_accuracy"] >= 0.98


@pytest.mark.limit(500)
def test_same_bits_on_two_ranks(tmp_path):
    flags = ["-m", "dpresnet.train", "--replicas", "4", "--steps", "13", "--out"]
    one = result(tmp_path / "1", python([*flags, str(tmp_path / "1")], timeout=240))
    two = result(tmp_path / "2", mpirun(2, [*flags, str(tmp_path / "2")], timeout=240))
    assert one["params_sha256"] == two["params_sha256"]
